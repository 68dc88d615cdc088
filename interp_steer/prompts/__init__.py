"""Prompts: read from files, judged as items, split into parts, turned into tokens.

prompt    text or the messages of a chat; `chat` makes these
item      `Item`: a prompt, with what its answer is judged by
entry     one entry of a prompt file, in each form that the field's data sets use
file      prompt files: plain text, JSON, JSON lines, CSV, TSV
parts     selection and held-out prompts, so that no question stands in both
template  what a chat template makes of messages
codec     text to token ids and back, for a tokenizer that is handed in

Start from `read_items(file)`. Nothing here needs a model.
"""
