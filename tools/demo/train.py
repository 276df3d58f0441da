"""Trains one stage of the model that nnsight carries: `python tools/demo/train.py --stage 1 --out build/model/stage-1`.

Takes two cores and writes a transformers folder with float16 weights every few minutes. `recipe.py` runs all stages;
the card comes from `card.py`.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from batches import N_POSITIONS, Batch, Mixer
from muon import Muon
from stages import N_WORKERS, STAGES, Stage
from tokenizer import Encoder, build
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel
from words import OPENINGS, required_words


def new_model(n_tokens: int, end: int, args: argparse.Namespace) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=n_tokens,
        n_positions=N_POSITIONS,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return GPT2LMHeadModel(config)


def loss_and_errors(model: GPT2LMHeadModel, batch: Batch, mixer: Mixer) -> torch.Tensor:
    """The weighted loss of a batch; tells the mixer which answers were wrong."""
    logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets, weights, tasks = (x[:, 1:].flatten() for x in (batch.ids, batch.weights, batch.tasks))
    with torch.no_grad():
        answers = tasks >= 0
        mixer.saw(logits[answers].argmax(-1) != targets[answers], tasks[answers])
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


def rate(progress: float, n_done: int, stage: Stage) -> float:
    """The learning rate's factor: a warm-up, level, then down to zero over the last part."""
    return min(1.0, (n_done + 1) / stage.warmup) * min(1.0, max(0.0, 1 - progress) / max(stage.decay, 1e-9))


def save(weights: dict[str, torch.Tensor], model: GPT2LMHeadModel, tokenizer: object, folder: Path) -> None:
    """Write a folder that `from_pretrained` loads, with the given weights rounded to float16."""
    half = GPT2LMHeadModel(model.config)
    half.load_state_dict(weights)
    half.half().save_pretrained(folder)
    # Loaded without a dtype, it should run in float32: processors are slow and coarse in float16.
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)


def share_gradients(weights: list[torch.Tensor], progress: float) -> float:
    """Average the gradients over the processes; return the progress of the first, so that all stop together."""
    n_workers = dist.get_world_size()
    first = torch.tensor([progress * n_workers if dist.get_rank() == 0 else 0.0])
    flat = torch.cat([first, *(weight.grad.flatten() for weight in weights)])
    dist.all_reduce(flat)
    flat /= n_workers
    for weight, gradient in zip(weights, flat[1:].split([weight.numel() for weight in weights])):
        weight.grad.copy_(gradient.view_as(weight))
    return flat[0].item()


def train(rank: int, args: argparse.Namespace) -> None:
    """One process's part of the training; the first one reports and writes."""
    dist.init_process_group("gloo", f"file://{args.meeting}", rank=rank, world_size=N_WORKERS)
    stage = STAGES[args.stage - 1]
    torch.manual_seed(stage.seed)
    torch.set_num_threads(1)
    tokenizer = build(required_words(), OPENINGS)
    mixer = Mixer(Encoder(tokenizer), stage, stage.seed * N_WORKERS + rank)
    model = new_model(len(tokenizer), tokenizer.eos_token_id, args)
    if args.start:
        model.load_state_dict(GPT2LMHeadModel.from_pretrained(args.start, dtype=torch.float32).state_dict())
    weights = list(model.parameters())
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".h." in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or ".h." not in name]
    optimizers = [Muon(matrices, stage.lr), AdamW(others, stage.lr * 0.6, betas=(0.9, 0.95), weight_decay=0.01)]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    first = {name: weight.clone() for name, weight in model.state_dict().items()}
    averaged = {name: weight.clone() for name, weight in first.items()}
    start = saved = time.monotonic()
    n_done = n_tokens = 0
    progress = 0.0
    while progress < 1:
        batch = mixer.batch()
        loss = loss_and_errors(model, batch, mixer)
        loss.backward()
        spent = (time.monotonic() - start) / 60
        progress = share_gradients(weights, spent / args.minutes if args.minutes else (n_done + 1) / args.batches)
        factor = rate(progress, n_done, stage)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, top in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = top * factor
            optimizer.step()
        model.zero_grad(set_to_none=True)
        n_done += 1
        n_tokens += batch.ids.numel() * N_WORKERS
        for name, weight in model.state_dict().items():
            averaged[name].lerp_(weight, max(0.01, 1 / n_done))
        if rank == 0 and n_done % 50 == 0:
            errors = " ".join(f"{name[:9]} {error:.2f}" for name, error in mixer.error.items())
            print(
                f"{n_done} {spent:.1f} min {n_tokens / 1e6:.2f} M loss {loss.item():.3f} | wrong: {errors}", flush=True
            )
        if rank == 0 and (time.monotonic() - saved > 60 * args.save_every or progress >= 1):
            save(
                {name: first[name].lerp(weight, stage.kept) for name, weight in averaged.items()},
                model,
                tokenizer,
                args.out,
            )
            print(f"== {n_done} written to {args.out}", flush=True)
            saved = time.monotonic()
    if rank == 0:
        print(f"== {n_done} batches, {n_tokens / 1e6:.1f} M tokens, {(time.monotonic() - start) / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--stage", type=int, required=True, help=f"which of stages.py, 1 to {len(STAGES)}")
    parser.add_argument("--start", type=Path, help="folder of the model to go on from")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--batches", type=int, help="batches to train (the stage's own number)")
    how_long.add_argument(
        "--minutes", type=float, help="time to train instead; how many batches that is depends on the machine"
    )
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--save-every", type=float, default=4.0, help="minutes between checkpoints")
    args = parser.parse_args()
    args.batches = args.batches or STAGES[args.stage - 1].batches
    with tempfile.TemporaryDirectory() as folder:
        args.meeting = f"{folder}/meeting"
        torch.multiprocessing.spawn(train, (args,), nprocs=N_WORKERS)


if __name__ == "__main__":
    main()
