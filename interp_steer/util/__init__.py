"""Files, terminals and values from outside: what several rooms need and none owns.

files        where files live, and how one is written: whole or not at all
locking      who may write to a run's folder
packed       gzipped files and answers, unpacked within bounds
tensor_file  safetensors files with our header, checked before they are believed
yaml_text    YAML that a person wrote, bounded before it is built
json_shape   whether a value read from a file has the nested shape that it must have
typed        whether one field of a request has the right type, with a hint for its writer
console      text made safe for a terminal, and progress on stderr
html         small tables for notebooks

Start from `files.whole(path)`, which writes a file.
"""
