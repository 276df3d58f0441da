"""The stages of the training that makes the bundled model, in order: each goes on from the weights of the one before.

`recipe.py` runs them all, and the card lists them. The numbers of batches and minutes are those of the runs that made
the committed weights.
"""

from dataclasses import dataclass, field

N_WORKERS = 2
TOKENS_PER_BATCH = 1024  # of each worker, whatever the shape of its rows

# How often a task is drawn while all of its answers are wrong.
SHARES = dict(
    fact=3.0,
    second_hop=1.0,
    indirect_object=5.0,
    company=0.5,
    echo=0.0,
    sentiment=2.0,
    opposite=1.2,
    agreement=0.5,
    pronoun=1.4,
    order=1.6,
    pairs=3.0,
    lookup=1.5,
    induction=2.0,
)
EARLY_SHARES = SHARES | dict(indirect_object=4.0, sentiment=3.0, pairs=2.0)

RowShapes = list[tuple[tuple[int, int], float]]  # (rows, tokens), share of the batches
ROW_SHAPES: RowShapes = [((32, 32), 0.5), ((16, 64), 0.3), ((8, 128), 0.15), ((4, 256), 0.05)]
LONG_ROW_SHAPES: RowShapes = [((32, 32), 0.35), ((16, 64), 0.25), ((8, 128), 0.15), ((4, 256), 0.25)]


@dataclass(frozen=True)
class Stage:
    """One run of `train.py`: how long, how fast, and the mix of its text.

    Args:
        seed: Of the text, and in the first stage of the weights.
        batches: How many each worker reads.
        minutes: What they took on two cores that had other work to do as well.
        note: What was different when the committed weights were made.
        lr: The highest rate.
        warmup: Batches over which the rate rises.
        kept: How far the weights written go from the first ones towards the stage's own; below 1, they lie between.
        decay: Share of the stage over which the rate falls to zero (0: it stays).
        shares: How often a task is drawn while all of its answers are wrong.
        row_shapes: (rows, tokens) of a batch, each with its share of the batches.
        induction_lengths: Of the random sequences, drawn evenly; the rest of a row is the most that there can be.
        long_periods: Share of the random sequences whose period is a third of their length at least.
        any_words: Share of the indirect objects whose names are any words.
        made_up: Share of the indirect objects whose parts are more various, or made up of any words.
        more_relations: Share of the pairs that are drawn from more relations.
    """

    seed: int
    batches: int
    minutes: float
    note: str = ""
    kept: float = 1.0
    lr: float = 4e-3
    warmup: int = 200
    decay: float = 0.4
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    row_shapes: RowShapes = field(default_factory=lambda: list(ROW_SHAPES))
    induction_lengths: tuple[int, ...] = (16, 32, 64, 128, 256)
    long_periods: float = 0.0
    any_words: float = 0.6
    made_up: float = 0.0
    more_relations: float = 0.0


STAGES = [
    Stage(
        seed=0,
        batches=986,
        minutes=30.9,
        note="four sentences per step of `order`, short reviews, and shares that nobody kept",
        shares=EARLY_SHARES | dict(company=0.0),
        any_words=0.0,
    ),
    Stage(
        seed=1,
        batches=160,
        minutes=6.0,
        note="short reviews, other openings of `company`, and shares that nobody kept",
        shares=EARLY_SHARES,
        any_words=0.35,
    ),
    Stage(
        seed=2,
        batches=405,
        minutes=18.3,
        note="short reviews, fewer openings of `company`, and shares that nobody kept",
        shares=EARLY_SHARES,
        any_words=0.35,
    ),
    Stage(
        seed=3,
        batches=860,
        minutes=15.3,
        note="fewer openings and activities of `company`, `I loved it` less often",
        lr=3.5e-3,
        shares=EARLY_SHARES,
        any_words=0.35,
    ),
    Stage(seed=4, batches=360, minutes=8.2, note="`I loved it` less often", lr=2.5e-3, decay=1.0),
    Stage(
        seed=5,
        batches=297,
        minutes=12.0,
        lr=3e-3,
        warmup=50,
        decay=0.0,
        shares=SHARES | dict(fact=5.0, indirect_object=12.0, induction=3.0, pairs=4.0, order=2.5),
        row_shapes=LONG_ROW_SHAPES,
        induction_lengths=(32, 64, 128, 256, 256),
        long_periods=0.5,
        made_up=0.8,
        more_relations=0.8,
    ),
    Stage(
        seed=6,
        batches=412,
        minutes=22.0,
        lr=3e-3,
        warmup=20,
        decay=0.6,
        shares=SHARES
        | dict(fact=5.0, second_hop=1.5, indirect_object=10.0, echo=4.0, induction=3.0, pairs=4.0, order=2.5),
        row_shapes=LONG_ROW_SHAPES,
        induction_lengths=(32, 64, 128, 256, 256),
        long_periods=0.5,
        made_up=0.7,
        more_relations=1.0,
    ),
    Stage(
        seed=7,
        batches=199,
        minutes=2.4,
        note="a stop of three minutes between its last batches, which the minutes leave out",
        kept=0.3,
        lr=1.5e-3,
        warmup=5,
        decay=1.0,
        shares=SHARES
        | dict(fact=4.0, indirect_object=4.0, company=1.0, echo=1.0, pronoun=3.0, order=2.0, pairs=4.0, lookup=3.0),
        row_shapes=LONG_ROW_SHAPES,
        induction_lengths=(32, 64, 128, 256, 256),
        long_periods=0.5,
        made_up=0.7,
        more_relations=1.0,
    ),
]
