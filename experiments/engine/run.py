"""Executing an experiment in its run folder.

All arms advance together, one record of each in turn, so that their times are measured side by side under the same
load; the order within a round rotates.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from experiments.config.experiment import Experiment, TrainConfig
from experiments.engine.arm import Advance, Arm, MemberFigures
from experiments.engine.training import NOT_YET
from experiments.errors import RunError
from experiments.run_folder.folder import RunFolder
from experiments.run_folder.record import Numbers, Record, Sample, Time


@dataclasses.dataclass(frozen=True)
class Progress:
    """An arm reached a record."""

    arm: str
    """The arm's name."""

    step: int
    """How many steps it has made."""

    train_loss: float
    """The mean since the last record, over all seeds and rates."""

    examples_per_second: float
    """Of all seeds and rates together."""


def begin(arms: dict[str, Arm], folder: RunFolder) -> tuple[int, list[str]]:
    """Put all arms to where the run folder stands: at its newest checkpoint, or at the start.

    Returns:
        The step, and what to tell the user.
    """
    fresh = not folder.checkpoints.steps()
    like = None if fresh else {name: arm.abstract() for name, arm in arms.items()}
    step, states, notes = folder.begin(like)
    for name, arm in arms.items():
        arm.restore([] if states is None else states[name])
    return step, notes


def execute(
    experiment: Experiment,
    arms: dict[str, Arm],
    folder: RunFolder,
    step: int,
    on_compile: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> Iterator[Progress]:
    """Train all arms side by side from `step` to the end.

    Arguments:
        experiment: what the arms are of.
        arms: as `begin` left them.
        folder: gets records and checkpoints.
        step: where `begin` says the arms are.
        on_compile: hears of each arm before it is compiled.
        check: is called again and again where something else than training takes long; it may raise.

    Raises:
        RunError: a loss that is not finite stops the run, or something cannot be written.
    """
    train, names, waiting = experiment.train, list(arms), set(arms)
    while step < train.steps:
        turn = step // train.record_every % len(names)
        step += train.record_every
        for name in names[turn:] + names[:turn]:
            if name in waiting:
                on_compile(name)
                arms[name].prepare()
                waiting.remove(name)
            yield advance(name, arms[name], train, folder, step, check)
        if step % train.save_period == 0 or step == train.steps:
            folder.save(step, {name: arm.snapshot() for name, arm in arms.items()})


def advance(
    name: str, arm: Arm, train: TrainConfig, folder: RunFolder, step: int, check: Callable[[], None] = lambda: None
) -> Progress:
    """Train an arm up to the next record, and write it.

    Arguments:
        name: the arm's.
        arm: prepared.
        train: the length of training, and what happens on the way.
        folder: gets the record.
        step: the step of the record.
        check: is called again and again where something else than training takes long.

    Raises:
        RunError: a loss that is not finite stops the run, or something cannot be written.
    """
    start = time.perf_counter()
    advanced = arm.advance()
    seconds = (time.perf_counter() - start) / train.record_every

    figures, by_layer = advanced.figures, dict[str, MemberFigures]()
    if step % train.evaluation_period == 0 or step == train.steps:
        last = step == train.steps and not _stops(arm, train, advanced)
        figures = figures | _evaluated(arm, last, check)
        by_layer = arm.statistics()
        for sample in _samples(name, arm, step):
            folder.write_sample(sample)
        for rate, images in _pictures(arm, advanced.nonfinite_step):
            folder.write_pictures(name, rate, step, images)

    for record in _records(name, arm, step, figures, by_layer, advanced):
        folder.write(record)
    folder.write_time(Time(name, step, seconds))
    # Only now: the record of a loss that stops the run says when, and of which seed.
    _check_finite(name, arm, train, folder, advanced)
    examples = len(arm.members) * arm.config.data.batch_size
    return Progress(name, step, float(np.mean(figures["train_loss"])), examples / seconds)


def _evaluated(arm: Arm, last: bool, check: Callable[[], None]) -> MemberFigures:
    """Figures of the held-out examples; at the end of a run, where this is the `last`, also what takes long."""
    found = {**arm.evaluate(), **(arm.log_likelihood(check) if last else {})}
    held_out = arm.placement.dataset.held_out_name
    return {f"{held_out}_{key}": value for key, value in found.items()}


def _records(
    name: str, arm: Arm, step: int, figures: MemberFigures, by_layer: dict[str, MemberFigures], advanced: Advance
) -> Iterator[Record]:
    """A record for each learning rate."""
    seeds, first_seed = arm.config.train.seeds, arm.config.train.first_seed
    for number, rate in enumerate(arm.config.optimizer.learning_rate):
        own = slice(number * seeds, (number + 1) * seeds)
        steps = advanced.nonfinite_step[own]
        at_fault = enumerate(advanced.at_fault[own], first_seed)
        yield Record(
            arm=name,
            learning_rate=rate,
            step=step,
            figures={key: _numbers(values[own]) for key, values in figures.items()},
            by_layer={
                kind: {layer: _numbers(values[own]) for layer, values in layers.items()}
                for kind, layers in by_layer.items()
            },
            nonfinite_step=[_or_none(int(step)) for step in steps] if (steps != NOT_YET).any() else None,
            at_fault={str(seed): _words(terms) for seed, terms in at_fault if terms},
        )


def _samples(name: str, arm: Arm, step: int) -> Iterator[Sample]:
    """A record for each learning rate, with a text for each seed."""
    texts, seeds = arm.samples(), arm.config.train.seeds
    for start in range(0, len(texts), seeds):
        rate, _ = arm.members[start]
        yield Sample(name, rate, step, texts[start : start + seeds])


def _pictures(arm: Arm, nonfinite_step: np.ndarray) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """For each learning rate, what the network of the first seed that stayed finite makes."""
    finite: dict[float, int] = {}
    for member, (rate, _) in enumerate(arm.members):
        if nonfinite_step[member] == NOT_YET:
            finite.setdefault(rate, member)
    images = arm.pictures() if finite else {}
    for rate, member in finite.items() if images else ():
        yield rate, {kind: all_of[member] for kind, all_of in images.items()}


def _numbers(values: np.ndarray) -> Numbers:
    """Numbers with as many digits as a float32 has."""
    return [float(f"{number:.9g}") for number in values]


def _words(terms: tuple[str, ...]) -> str:
    return " and ".join(terms)


def _or_none(step: int) -> int | None:
    return None if step == NOT_YET else step


def _stops(arm: Arm, train: TrainConfig, advanced: Advance) -> bool:
    """Whether a loss that is not finite ends the run."""
    stops = train.on_nonfinite == "stop" or (train.on_nonfinite == "auto" and len(arm.members) == 1)
    return stops and bool((advanced.nonfinite_step != NOT_YET).any())


def _check_finite(name: str, arm: Arm, train: TrainConfig, folder: RunFolder, advanced: Advance) -> None:
    """Check that no loss stops the run.

    Raises:
        RunError: one is not finite, and that is the rule.
    """
    if not _stops(arm, train, advanced):
        return
    steps = advanced.nonfinite_step
    member = int(np.argmax(steps != NOT_YET))
    rate, seed = arm.members[member]
    which = f"arm {name!r} (learning rate {rate:g}, seed {seed})"
    try:
        saved = folder.checkpoints.last()
        good = f"the last good checkpoint: {saved}" if saved else "no checkpoint was made before"
    except RunError as error:
        good = f"no checkpoint could be written: {error}"
    terms = _words(advanced.at_fault[member])
    raise RunError(
        f"the loss of {which}{f' ({terms})' if terms else ', or its update,'} was not finite at step "
        f"{steps[member]}; {good}. Begin anew with a lower "
        "learning rate or optimizer.clip_norm, or go on with --resume --set train.on_nonfinite=mark for the other arms"
    )
