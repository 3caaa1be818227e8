// Runs llama.cpp on a GGUF file: node llama_cpp.mjs JOB.json, answers as JSON on the last line of stdout.
//
// A job: {"model": path, "lora": path or null, "tasks": [...]}; each task is one of
//   {"tokenize": text}                   -> [ids], special tokens read as such
//   {"tokens": [ids], "generate": n}     -> [ids], greedy, up to n or the end of the turn
//   {"tokens": [ids], "next": true}      -> [ids], the likeliest next token after each
//   {"tokens": [ids], "logits": true}    -> [[logits]], after each
import {readFileSync} from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 2});
const model = await llama.loadModel({modelPath: job.model});
const longest = Math.max(...job.tasks.map((task) => (task.tokens?.length ?? 0) + (task.generate ?? 0)));
const context = await model.createContext({contextSize: Math.max(256, longest + 8), ...(job.lora ? {lora: job.lora} : {})});
const sequence = context.getSequence();

async function answer(task) {
    if (task.tokenize !== undefined) return [...model.tokenize(task.tokenize, true)];
    await sequence.clearHistory();
    if (task.generate) {
        const found = [];
        for await (const token of sequence.evaluate(task.tokens, {temperature: 0})) {
            found.push(token);
            if (model.isEogToken(token) || found.length >= task.generate) break;
        }
        return found;
    }
    const generateNext = task.logits ? {logits: true} : {token: true, options: {temperature: 0}};
    const outputs = await sequence.controlledEvaluate(task.tokens.map((token) => [token, {generateNext}]));
    if (!task.logits) return outputs.map((output) => output.next.token);
    return outputs.map((output) => {
        const row = [];
        for (const [token, logit] of output.next.logits) row[token] = logit;
        return row;
    });
}

const answers = [];
for (const task of job.tasks) answers.push(await answer(task));
process.stdout.write("\n" + JSON.stringify(answers) + "\n", () => process.exit(0));
