"""Commands that ask what breaks without a part, and where steering acts.

ablate   takes parts of the model out, patches, and traces steering
request  what `ablate` is asked, checked before a model loads
patch    where an answer is kept, from one pair of prompts
"""
