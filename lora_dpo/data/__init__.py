"""Preference data: rows of files and hub data sets to pairs of messages, and these to token ids.

unpacked         the unpacked size of gzip and Parquet, for the limits of uploads
row_reading      what every reader of rows shares
json_rows        rows of JSON and JSONL files
table            a header above rows of cells, and how both are told
language         the language of a text, silent when unsure
encoding         the encoding that a table was saved in
csv_rows         rows of tables that are text
sheet_rows       rows of spreadsheets: .xlsx and .ods
hub_rows         rows of data sets on the hub
rows             the rows of any source; Parquet is read here
messages         chat messages out of whatever a cell holds
pairs            what a preference pair is, and how reading accounts for every row
formats/         what a row means: one function a published format, and the table that chooses
column_words     the words by which a column says what it is
columns          what each column of a file is: named, known to a format, or told by its words
read             sources to pairs, with an account of every row
answers          single answers, good or bad, for SFT and KTO
prompts          prompts to sample answers to
questions        questions with known answers
write            pairs back into files: split, convert, mix
journal          rows that are on the disk, one by one, before they count
template_trial   a chat template, run once in a process with limits
chat_template    messages to token ids through it
keywords_read    which keywords it reads
thoughts         what of an answer is thought before it
tokenize         pairs to token ids, truncated where they are too long
template_notes   what a run says of its data and the template before it trains
token_view       a pair as the model reads it, for looking at
doctor/          what would spoil a run: findings with rows and examples
"""

from __future__ import annotations

from lora_dpo.data.chat_template import Message
from lora_dpo.data.pairs import Dropped, Origin, PreferencePair, ReadReport
from lora_dpo.data.prompts import read_prompts
from lora_dpo.data.read import read_pairs
from lora_dpo.data.tokenize import TokenPair, tokenize_pairs

__all__ = [
    "Dropped",
    "Message",
    "Origin",
    "PreferencePair",
    "ReadReport",
    "TokenPair",
    "read_pairs",
    "read_prompts",
    "tokenize_pairs",
]
