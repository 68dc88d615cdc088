"""What a terminal needs beside the commands themselves.

completion  what may come next in a command that is being typed, for bash, zsh and fish
hints       a wrong call in one line, with what was probably meant
"""
