"""Times batches of forward passes in one environment, on request: a JSON line in, a JSON line out.

Run by bench.py, with a device and the names of libraries: once with this library and once in the environment of the
package that it is compared with. The same lines run on both.
"""

import contextlib
import copy
import importlib.metadata
import json
import os
import sys
import time
import warnings
from functools import partial

import greenlet
import torch

N_LAYERS = 12
N_TOKENS = 10
N_STEPS = 20
ROWS_OF_TWO = ("patch rows", "patch invokes")
GENERATION = {"max_new_tokens": N_STEPS, "min_new_tokens": N_STEPS, "do_sample": False, "pad_token_id": 1}
READ_AT = 5
DEVICE = torch.device("cpu")


def make_module(width):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=1000,
        n_positions=64,
        n_embd=width,
        n_layer=N_LAYERS,
        n_head=max(4, width // 64),
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval().to(DEVICE)


def twin_of(module):
    """A module of its own with the very same parameters."""
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, shared)


def make_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(1000)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1", pad_token="w1")


def steering(value):
    """A vector for each step: [step, width]."""
    return value[0, 0] * torch.linspace(-1, 1, N_STEPS, device=value.device)[:, None]


class Enough(Exception):
    """Ends a forward pass early, as one does with plain hooks."""


def plain_torch(module, ids, value):
    """What each row costs by hand: hooks that are registered, used once and removed."""
    module = twin_of(module)
    layers, vectors, two = module.transformer.h, steering(value), two_prompts(ids)

    def run_with(*hooks, on=ids):
        handles = [layer.register_forward_hook(hook) for layer, hook in hooks]
        try:
            return module(on)
        finally:
            for handle in handles:
                handle.remove()

    def in_a_greenlet():
        greenlet.greenlet(lambda: module(ids)).switch()

    def pause_in(*layers):
        """The least that a block costs which the model waits for: a greenlet, and hooks that switch to it."""
        block = greenlet.getcurrent()

        def pause(_module, _args, output):
            block.switch(output)

        model = greenlet.greenlet(lambda: run_with(*[(layer, pause) for layer in layers]))
        seen = [model.switch() for _ in layers]
        model.switch()
        return seen

    def read_one():
        seen = []
        run_with((layers[READ_AT], lambda _module, _args, output: seen.append(output)))

    def read_twelve():
        seen = []
        run_with(*[(layer, lambda _module, _args, output: seen.append(output)) for layer in layers])

    def cache_twelve():
        seen = {}
        run_with(*[(layer, partial(keep, seen, f"transformer.h.{i}")) for i, layer in enumerate(layers)])

    def cache_all():
        seen = {}
        run_with(*[(part, partial(keep, seen, path)) for path, part in module.named_modules()])

    def steer_steps():
        step = [-1]

        def count(_module, _args):
            step[0] += 1

        counter = module.register_forward_pre_hook(count)
        steer = layers[READ_AT].register_forward_hook(lambda _module, _args, output: output + vectors[step[0]])
        try:
            module.generate(ids, **GENERATION)
        finally:
            counter.remove()
            steer.remove()

    def read_in_steps():
        seen = []
        handles = [layer.register_forward_hook(lambda _m, _args, output: seen.append(output)) for layer in layers]
        try:
            module.generate(ids, **GENERATION)
        finally:
            for handle in handles:
                handle.remove()

    def keep(seen, path, _module, _args, output):
        seen[path] = output.detach() if isinstance(output, torch.Tensor) else output

    def write_one():
        run_with((layers[READ_AT], lambda _module, _args, _output: value))

    def patch():
        run_with((layers[READ_AT], lambda _module, _args, output: output[:1].expand(2, -1, -1)), on=two)

    def read_in_attention():
        seen = []
        at = layers[READ_AT].attn.c_proj  # what it is given is what the attention's function returned
        handle = at.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            module(ids)
        finally:
            handle.remove()

    def heads():
        seen, attention = [], layers[READ_AT].attn
        of_heads = (*ids.shape, attention.num_heads, attention.head_dim)

        def split(_module, _args, output):
            seen.extend(part.view(of_heads) for part in output.split(attention.split_size, -1))

        handles = [
            attention.c_attn.register_forward_hook(split),
            attention.c_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0].view(of_heads))),
        ]
        try:
            module(ids)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def grad_twelve():
        seen = []
        output = run_with(*[(layer, lambda _module, _args, output: seen.append(output)) for layer in layers])
        return torch.autograd.grad(output.logits.sum(), seen)

    def read_one_and_stop():
        seen = []

        def stop(_module, _args, output):
            seen.append(output)
            raise Enough

        with contextlib.suppress(Enough):
            run_with((layers[READ_AT], stop))

    return {
        "bare": lambda: module(ids),
        "greenlet": in_a_greenlet,
        "pause at one": lambda: pause_in(layers[READ_AT]),
        "pause at twelve": lambda: pause_in(*layers),
        "read one": read_one,
        "read twelve": read_twelve,
        "write one": write_one,
        "heads of one": heads,
        "read one and stop": read_one_and_stop,
        "cache twelve": cache_twelve,
        "cache all": cache_all,
        "steer each step": steer_steps,
        "read twelve in each step": read_in_steps,
        "patch rows": patch,
        "patch invokes": patch,
        "read in a forward": read_in_attention,
        "grad twelve": grad_twelve,
        "backward twelve": grad_twelve,
    }


def two_prompts(ids):
    return torch.cat([ids, ids.flip(-1)])


def traced(wrap, module, ids, value):
    """The same, through a wrapper. `.save()` is what the compared package needs; here it returns its object."""
    wrapped_only = twin_of(module)
    wrap(wrapped_only)
    model, vectors, two = wrap(twin_of(module)), steering(value), two_prompts(ids)

    def empty():
        with model.trace(ids):
            pass

    def read_one():
        with model.trace(ids):
            hidden = model.transformer.h[READ_AT].output.save()
        return hidden

    def read_twelve():
        with model.trace(ids):
            hidden = list().save()  # noqa: C408
            for layer in model.transformer.h:
                hidden.append(layer.output)
        return hidden

    def write_one():
        with model.trace(ids):
            model.transformer.h[READ_AT].output = value

    def heads():
        with model.trace(ids):
            attention = model.layers[READ_AT].attn
            seen = [attention.q, attention.k, attention.v, attention.z]
        return seen

    def read_one_and_stop():
        with model.trace(ids) as tracer:
            hidden = model.transformer.h[READ_AT].output.save()
            tracer.stop()
        return hidden

    def cache_twelve():
        with model.trace(ids) as tracer:
            cache = tracer.cache(modules=list(model.transformer.h), device=value.device)
        return cache

    def cache_all():
        with model.trace(ids) as tracer:
            cache = tracer.cache(device=value.device)
        return cache

    def steer_steps():
        with model.trace(ids, fn="generate", **GENERATION) as tracer:
            for step in tracer.iter[:N_STEPS]:
                layer = model.transformer.h[READ_AT]
                layer.output = layer.output + vectors[step]

    def read_in_steps():
        with model.trace(ids, fn="generate", **GENERATION) as tracer:
            hidden = list().save()  # noqa: C408
            for _step in tracer.iter[:N_STEPS]:
                for layer in model.transformer.h:
                    hidden.append(layer.output)
        return hidden

    def patch_rows():
        with model.trace(two) as (a, b):
            b.transformer.h[READ_AT].output = a.transformer.h[READ_AT].output

    def patch_invokes():
        with model.trace() as tracer:
            with tracer.invoke(two[:1]):
                hidden = model.transformer.h[READ_AT].output
            with tracer.invoke(two[1:]):
                model.transformer.h[READ_AT].output = hidden

    def read_in_forward():
        with model.trace(ids):
            mixed = model.transformer.h[READ_AT].attn.source.attention_interface_1.output[0].save()
        return mixed

    def grad_twelve():
        from nnsight import grad

        with model.trace(ids):
            hidden = [layer.output for layer in model.transformer.h]
            grads = grad(model.output.logits.sum(), hidden)
        return grads

    def backward_twelve():
        with model.trace(ids):
            grads = list().save()  # noqa: C408
            hidden = [layer.output for layer in model.transformer.h]
            with model.output.logits.sum().backward():
                for each in hidden[::-1]:
                    grads.append(each.grad)
        return grads

    def first_trace(fresh):
        first = wrap(fresh)
        with first.trace(ids):
            hidden = first.transformer.h[READ_AT].output.save()
        return hidden

    return {
        "empty trace": empty,
        "read one": read_one,
        "read twelve": read_twelve,
        "write one": write_one,
        "heads of one": heads,
        "read one and stop": read_one_and_stop,
        "cache twelve": cache_twelve,
        "cache all": cache_all,
        "steer each step": steer_steps,
        "read twelve in each step": read_in_steps,
        "patch rows": patch_rows,
        "patch invokes": patch_invokes,
        "read in a forward": read_in_forward,
        "grad twelve": grad_twelve,
        "backward twelve": backward_twelve,
        "wrapped, no trace": lambda: wrapped_only(ids),
        "first trace": (lambda: twin_of(module), first_trace),
    }


def make_variants(width, libraries):
    module = make_module(width)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (1, N_TOKENS), generator=generator).to(DEVICE)
    value = torch.randn(1, N_TOKENS, width, generator=generator).to(DEVICE)
    variants = {}
    for library, wrap in libraries.items():
        rows = plain_torch(module, ids, value) if wrap is None else traced(wrap, module, ids, value)
        for row, work in rows.items():
            # A bare pass for each variant, of a module that nothing else runs: neither side has the warmer memory.
            bare = twin_of(module)
            generates = row.endswith("each step")
            given = two_prompts(ids) if row in ROWS_OF_TWO else ids
            floor = partial(bare.generate, ids, **GENERATION) if generates else partial(bare, given)
            if works(work, library, row):
                variants[library, row] = work, floor
    return variants


def works(work, library, row):
    """Whether a library can do this at all."""
    try:
        seconds(work)
    except Exception as error:  # noqa: BLE001  whatever it is, the row is left out, and this says why
        which = "LanguageModel" if library == "language" else "NNsight"
        print(f"no {row!r} in {which} {version_of('nnsight')}: {error}".splitlines()[0][:120], file=sys.stderr)
        return False
    return True


def seconds(work):
    """A pair is what prepares a run, untimed, and the run."""
    prepare, run = work if isinstance(work, tuple) else (None, work)
    arguments = () if prepare is None else (prepare(),)
    clock = time.process_time if DEVICE.type == "cpu" else accelerated_time  # other programs' time does not count
    began = clock()
    run(*arguments)
    return clock() - began


def accelerated_time():
    """The time on the wall, once the accelerator has done all that it was given."""
    torch.accelerator.synchronize()
    return time.perf_counter()


def time_pairs(work, bare, count):
    """Seconds of `count` runs, each beside a bare pass: a machine that slows down slows both."""
    pairs = []
    for i in range(count):
        if i % 2:
            pairs.append((seconds(work), seconds(bare)))
        else:
            floor = seconds(bare)
            pairs.append((seconds(work), floor))
    return pairs


def find_libraries(asked):
    libraries = {"torch": None}
    if "nnsight" in asked:
        import nnsight

        libraries["nnsight"] = nnsight.NNsight
        if "language" in asked:
            tokenizer = make_tokenizer()
            libraries["language"] = lambda module: nnsight.LanguageModel(module, tokenizer=tokenizer)
    return libraries


def version_of(library):
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # imported from where its sources lie
        return sys.modules[library].__version__


def main():
    global DEVICE
    # What a library prints must not come between the lines of the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    def answer(**message):
        print(json.dumps(message), file=answers, flush=True)

    DEVICE = torch.device(sys.argv[1])
    libraries = find_libraries(sys.argv[2:])
    version = version_of("nnsight") if len(libraries) > 1 else None
    answer(version=version, torch=torch.__version__)
    variants = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "width" in request:
            variants = make_variants(request["width"], libraries)
            answer(variants=list(variants))
        else:
            work, bare = variants[request["library"], request["row"]]
            count = 1 if request["row"].endswith("each step") else request["count"]
            answer(pairs=time_pairs(work, bare, count))


if __name__ == "__main__":
    main()
