"""What leaves the toolkit exactly, and what comes in from others.

- `constant`: what of a line is a vector that is added at every position, or why it is none.
- `control_vector`: GGUF control vectors of llama.cpp and repeng, written and read.
- `steered_gguf`: a GGUF model whose blocks add the vectors themselves.
- `checkpoint`: a Hugging Face checkpoint whose biases add them; any server serves it.
- `harness`: the file of lm-eval's model `steered`.
- `request`: what servers with steering in the request expect: vllm-lens, interp-engine.
- `incoming`: directions from other tools' files and objects.

Start with `constants(parse(line, directions), model)`.
"""
