"""The demo: chat, vote, data, train and adapters in one window. Needs Gradio (`pip install 'lora-dpo[demo]'`).

votes          blind votes, each on the disk before it is acknowledged
pair_store     the pairs that someone collected
presets        from a choice of pairs and one word to a whole recipe
arena          blind matches
conversation   a conversation with one model, or with two side by side
run_state      what a run has told so far
session        what everyone at the demo shares
downloads      packages and exports that leave it
html           pieces of pages, escaped
theme          colours, style and keys
handlers       what every handler of the page does
column_pickers  the columns of an upload, where nobody can tell them
tab_chat, tab_vote, tab_data, tab_train, tab_adapters
api            the same for scripts
server         who may call it
app            the page
"""
