"""What a user gains end to end: muka_fast against the published procedure, same teachers, texts, student and steps, in one run.

    python bench/amalgamation.py --encoder DIR --train F --eval F [--texts 320] [--scopes last:1 head all] [--seeds 3] [--json F]
    python bench/amalgamation.py --synthetic toy|small|base        random weights and installed docstrings: times only, --seeds 1 with
                                                                   those of training
    python bench/amalgamation.py --encoder DIR ... --scaling       shared layers; peak memory against teachers and passes

Teachers are fine-tuned first (kept in --workdir); the pool is a random part of --train. Scoring times are medians of interleaved
repetitions; on a GPU every row scores once before, untimed: compiling. The published procedure pads every text to one length,
so its cost per text and per step is constant: it is timed on --published_texts texts and --published_steps steps and scaled,
which the result says; loading its teachers, which a row's time holds as well, is added once. Its students are trained for real,
by its own code over all texts and steps, on batches padded to their longest text: the same procedure, not its time. Correctness
first: in every scope the deterministic targets must equal the plain model's. The file is rewritten after every row, as unfinished
until the last. Over 400 lines: rows, timing and table of this one benchmark, which share their options and are of no other use.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from environment import command, device, keep, markdown_table, result_file, show
from published import load_plain, load_published, published_scores, published_seconds, published_student
from settings import digest, draw, read_rows, write_rows
from synthetic import SIZES, make_encoder, make_teacher, make_texts
from timing import largest_resident_bytes, own_process, ratio
from torch import Tensor
from transformers import AutoTokenizer
from work import work_of

import muka_fast
from muka_fast import teach
from muka_fast.config import RunConfig, ScoreConfig, TeachConfig, load_config
from muka_fast.data import TextSet, collate, read_texts, token_budget_batches, tokenize
from muka_fast.labels import LabelSpace, build_label_space
from muka_fast.memory import send, token_budget
from muka_fast.plan import scoring_forwards
from muka_fast.probe import ROUNDING
from muka_fast.stored import Supervision
from muka_fast.supervision import fill_store
from muka_fast.teachers import DTYPES, Teacher, load_teacher

TOLERANCE = 1e-4  # of the deterministic logits, relative to the largest


@dataclass(frozen=True)
class Row:
    """A row of the table: a scope, with or without an early end of the passes, and the precision of the teachers."""

    scope: str
    mc_stop: float | None = None
    precision: str = "fp32"

    @property
    def name(self) -> str:
        stop = "" if self.mc_stop is None else f", mc_stop {self.mc_stop:g}"
        return self.scope + stop + ("" if self.precision == "fp32" else f", {self.precision}")

    @property
    def options(self) -> dict:
        found = {"mc_scope": self.scope, "mc_stop": self.mc_stop, "scoring_precision": self.precision}
        return found | {"uncertainty": "predictive_entropy"}  # as published

    @property
    def plain(self) -> str:
        """The yardstick of this row, among the times."""
        return f"plain, {self.precision}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="folder of the pretrained encoder of teachers and student")
    parser.add_argument("--train", help="labelled texts: the teachers' training data and, unlabelled, the pool")
    parser.add_argument("--eval", help="labelled texts for the student's accuracy")
    parser.add_argument("--synthetic", choices=SIZES, help="random teachers of this size over docstrings instead")
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_teachers", type=int, default=2)
    parser.add_argument("--texts", type=int, default=320, help="texts of the pool")
    parser.add_argument("--eval_texts", type=int, default=400)
    parser.add_argument("--published_texts", type=int, default=32, help="texts on which the published scoring is timed")
    parser.add_argument("--published_steps", type=int, default=6, help="steps on which the published training is timed")
    parser.add_argument("--scopes", nargs="+", default=["last:1", "head", "all"])
    parser.add_argument("--mc_stop", type=float, default=0.05, help="level of the row `all` with adaptive K; 0 leaves it out")
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=["fp32"], help="of teachers; rows for each")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--seeds", type=int, help="students per row; 0 leaves the training out (default: 1, of --synthetic 0)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--freeze_layers", type=int, default=4, help="leading layers that the teachers share")
    parser.add_argument("--workdir", default="runs/bench_amalgamation", help="texts and teachers, made once for the same options")
    parser.add_argument("--stem", help="name of the files in bench/results (default: amalgamation)", default="amalgamation")
    parser.add_argument("--json", type=result_file, help="write the rows to this file instead of bench/results")
    parser.add_argument("--scaling", action="store_true", help="cost of shared layers, memory against teachers and passes")
    # JSON of teachers, row and samples: a process of its own scores once so and prints its peak memory
    parser.add_argument("--peak_of", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    ways = [(scope, None) for scope in args.scopes]
    ways += [("all", args.mc_stop)] if args.mc_stop and "all" in args.scopes else []
    args.rows = [Row(*way, precision) for precision in args.precisions for way in ways]
    args.seeds = (0 if args.synthetic else 1) if args.seeds is None else args.seeds
    if not args.synthetic and not (args.encoder and args.train and args.eval):
        parser.error("--encoder, --train and --eval, or --synthetic")
    for row in args.rows:
        load_config(RunConfig, None, row.options)  # which refuses what is no scope
    return args


def prepare(args: argparse.Namespace) -> list[str]:
    """Pool, evaluation texts and teachers of consecutive parts of the sorted labels in --workdir. Returns the teachers.

    Made once, in a folder for all options that decide about them.
    """
    deciding = [args.synthetic, args.encoder, args.train, args.eval, args.num_teachers, args.freeze_layers, args.max_length]
    work = Path(args.workdir) / digest(deciding)
    work.mkdir(parents=True, exist_ok=True)
    args.material = work
    if args.synthetic:
        args.train, args.eval = make_texts(Path(args.workdir), args.texts)
        args.encoder = str(work / "encoder")
        if not Path(args.encoder).is_dir():
            make_encoder(Path(args.encoder), args.synthetic, read_texts(args.train).texts)
    else:
        # Files may be sorted by label: parts are drawn at random.
        for name, limit in (("train", max(2000, args.texts)), ("eval", args.eval_texts)):
            write_rows(work / f"{name}.jsonl", draw(read_rows(Path(getattr(args, name))), limit, 0))
            setattr(args, name, str(work / f"{name}.jsonl"))
    labels = sorted(set(read_texts(args.train, need_labels=True).labels))
    size = -(-len(labels) // args.num_teachers)
    paths = []
    for i in range(args.num_teachers):
        path, part = work / f"teacher{i}", labels[i * size : (i + 1) * size]
        paths.append(str(path))
        if path.is_dir():
            continue
        if args.synthetic:
            layers = SIZES[args.synthetic][1]
            make_teacher(path, args.encoder, part, seed=i, own_layers=max(1, layers - args.freeze_layers))
            continue
        options = {"encoder": args.encoder, "train": args.train, "labels": part, "output": str(path)}
        options |= {"freeze_layers": args.freeze_layers, "epochs": 2, "learning_rate": 2e-4, "max_length": args.max_length}
        teach.main(load_config(TeachConfig, None, options))
    return paths


def plain_pass(teachers: list[Teacher], texts: TextSet, max_length: int) -> list[Tensor]:
    """The yardstick: one ordinary length-bucketed forward of every teacher in batches of our size, and tokenisation, once for each
    tokenizer, as ours is."""
    tokens_of, out = {}, []
    with torch.inference_mode():
        for teacher in teachers:
            if teacher.tokenizer_key not in tokens_of:
                tokens_of[teacher.tokenizer_key] = tokenize(teacher.tokenizer, texts.texts, max_length)
            tokens, device = tokens_of[teacher.tokenizer_key], teacher.model.device
            logits = torch.empty(len(tokens), len(teacher.labels), device=device)
            for rows in token_budget_batches(tokens.lengths, token_budget(None, teacher.model, device)):
                batch = {name: send(value, device) for name, value in collate(tokens, rows, teacher.pad_id).items()}
                logits[send(torch.as_tensor(rows), device)] = teacher.model(**batch).logits.float()
            out.append(logits)
        return [logits.cpu() for logits in out]


def score_with(
    args: argparse.Namespace, paths: list[str], texts: TextSet, row: Row, seed: int = 0, store: Path | None = None
) -> Supervision:
    """The product's own path, into a store that did not exist."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"teachers": paths, "texts": texts.source, "output": folder, "mc_samples": args.samples, **row.options}
        options |= {"seed": seed, "max_length": args.max_length, "device": args.device}
        config = load_config(ScoreConfig, None, options)
        return fill_store(store or Path(folder) / "store", paths, texts, config)


def clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def selections(supervision: Supervision) -> Tensor:
    return supervision.normalized_entropy.argmin(-1)


def agreement(a: Tensor, b: Tensor) -> float:
    return (a == b).float().mean().item()


def measure_scoring(args: argparse.Namespace, paths: list[str], texts: TextSet, stores: Path) -> dict:
    """The published procedure on a part, interleaved medians of plain pass and rows, and the selections of each row.

    Repetition r has run seed r; the scores of the first are kept in `stores` for the students.
    """
    load = lambda path, precision: load_teacher(path, run_seed=0, device=args.device, dtype=DTYPES[precision])
    teachers = {precision: [load(path, precision) for path in paths] for precision in args.precisions}
    plain = {precision: torch.cat(plain_pass(found, texts, args.max_length), -1) for precision, found in teachers.items()}
    published_s = {precision: published_seconds(args, paths, texts.texts, DTYPES[precision]) for precision in args.precisions}
    yardsticks = list(dict.fromkeys(row.plain for row in args.rows))
    times: dict[str, list[float]] = {name: [] for name in [*yardsticks, *(row.name for row in args.rows)]}
    found: dict[tuple[str, int], Supervision] = {}
    peaks: dict[str, int | None] = {}
    for row in args.rows if args.device == "cuda" else ():
        score_with(args, paths, texts, row)
    for repetition in range(args.repetitions):
        for name, found_teachers in zip(yardsticks, teachers.values(), strict=True):
            times[name].append(clock(lambda run=found_teachers: plain_pass(run, texts, args.max_length)))
        for row in args.rows:
            store = stores / row.name if repetition == 0 else None
            reset_peak(args.device)
            start = time.perf_counter()
            scored = score_with(args, paths, texts, row, repetition, store)
            times[row.name].append(time.perf_counter() - start)
            peaks[row.name] = device_peak(args.device)
            wanted = plain[row.precision]
            error = (scored.logits - wanted).abs().max() / wanted.abs().max()
            if not error < ROUNDING.get(DTYPES[row.precision], TOLERANCE):
                raise SystemExit(f"{row.name}: deterministic logits differ from the plain model's by {error:.1e}: no times are shown")
            if repetition < 2:
                found[row.name, repetition] = scored
            write_unfinished(args, timed_so_far(args, times, published_s), note(args, texts, paths, None))
    # Without the row `all` nothing is compared with it: it costs more than all others together.
    seeds = range(2) if "all" in args.scopes else ()
    every = Row("all", precision=args.precisions[0])
    full = [found.get((every.name, seed)) or score_with(args, paths, texts, every, seed) for seed in seeds]
    chosen = [selections(scored) for scored in full]
    sampled = {row.name: found[row.name, 0].num_samples for row in args.rows}
    samples = {name: args.samples if n is None else n.double().mean().item() for name, n in sampled.items()}
    return {
        "texts": len(texts.texts),
        "work": {p: work_of(found, texts, args.max_length, args.device, args.synthetic == "toy") for p, found in teachers.items()},
        "forwards": {
            row.name: scoring_forwards(teachers[row.precision][0].model.config, row.scope, samples[row.name]) for row in args.rows
        },
        "times": times,
        "published_s": published_s,
        "agreement": {row.name: agreement(selections(found[row.name, 0]), chosen[0]) for row in args.rows} if chosen else {},
        "mean_samples": samples,
        "agreement_all_vs_all": agreement(*chosen) if chosen else None,
        "peaks": peaks,
    }


def timed_so_far(args: argparse.Namespace, times: dict[str, list[float]], published_s: dict[str, float]) -> list[dict]:
    """Rows of what is known while they are still being timed."""
    seconds = {name: statistics.median(values) for name, values in times.items() if values}
    return [
        {
            "scope": row.name,
            "scoring_s": seconds[row.name],
            "plain_forward_s": seconds[row.plain],
            "published_s": published_s[row.precision],
            "cost_in_plain_forwards": ratio(times[row.name], times[row.plain]),
        }
        for row in args.rows
        if row.name in seconds
    ]


def measure_students(
    args: argparse.Namespace, paths: list[str], texts: TextSet, evaluation: TextSet, space: LabelSpace, stores: Path
) -> Iterator[tuple[dict, dict]]:
    """Accuracies over the seeds (none of random teachers) and median seconds of a training, per row (from its scores) and of the
    published procedure; anew after every seed."""
    accuracies: dict[str, list[float]] = {name: [] for name in [*(row.name for row in args.rows), "published"]}
    seconds: dict[str, list[float]] = {row.name: [] for row in args.rows}
    if args.synthetic:  # the time of a step does not depend on them
        scores = torch.rand(len(texts.texts), len(paths))
    else:
        scores = published_scores(args, load_published(paths, args.device), texts.texts, padding="longest")
    steps = args.epochs * -(-len(texts.texts) // args.batch_size)
    timed = lambda dtype: published_student(args, paths, texts.texts, scores, space, 0, "max_length", args.published_steps, dtype)[2]
    published_s = {f"published, {precision}": steps * timed(DTYPES[precision]) for precision in args.precisions}
    measure = lambda student, tokenizer: teach.measure(student, tokenizer, evaluation, space.names, args.max_length)["accuracy"]

    def train(row: Row, seed: int, folder: str) -> Path:
        result = muka_fast.amalgamate(
            store=stores / row.name, student=args.encoder, texts=args.train, limit=args.texts, output=f"{folder}/run",
            method="muka-soft", seed=seed, mc_samples=args.samples, epochs=args.epochs, device=args.device,
            learning_rate=args.learning_rate, batch_size=args.batch_size, max_length=args.max_length,
            precision=row.precision if args.device == "cuda" else "fp32", **row.options,
        )  # fmt: skip
        if result.stopped:  # by a signal, such as that of a time limit
            raise SystemExit(f"{row.name}: stopped while its student was trained: no time is shown")
        return result.output

    for seed in range(args.seeds):
        for row in args.rows:
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                output = train(row, seed, folder)
                seconds[row.name].append(time.perf_counter() - start)
                if not args.synthetic:
                    student = load_plain(output, args.device).eval()
                    accuracies[row.name].append(measure(student, AutoTokenizer.from_pretrained(output)))
        if not args.synthetic:
            student, tokenizer, _ = published_student(args, paths, texts.texts, scores, space, seed)
            accuracies["published"].append(measure(student, tokenizer))
        yield accuracies, {name: statistics.median(values) for name, values in seconds.items()} | published_s


def reset_peak(device: str) -> None:
    """Before what `device_peak` is asked for."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def device_peak(device: str) -> int | None:
    """What was allocated on the GPU at most beyond what is still there, since `reset_peak`; None for a CPU."""
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() if device == "cuda" else None


def peak_bytes(paths: list[str], row: Row, samples: int, *more: str) -> int:
    """Peak of a process of its own that scores once: what it allocates on a GPU, else its resident set, libraries included.

    more: further options of this script.
    """
    spec = json.dumps({"teachers": paths, "row": asdict(row), "samples": samples})
    return int(own_process(f"measuring the memory of {row.name}", *more, "--peak_of", spec))


def print_peak(args: argparse.Namespace, texts: TextSet) -> None:
    args.samples = args.peak_of["samples"]
    score_with(args, args.peak_of["teachers"], texts, Row(**args.peak_of["row"]))
    print(torch.cuda.max_memory_allocated() if args.device == "cuda" else largest_resident_bytes())


def rows_of(args: argparse.Namespace, scoring: dict, students: tuple[dict, dict] | None) -> list[dict]:
    """All figures; the peak of memory only where it is the GPU's."""
    rows = []
    for row in args.rows:
        times, plain_times = scoring["times"][row.name], scoring["times"][row.plain]
        seconds, plain = statistics.median(times), statistics.median(plain_times)
        published_s = scoring["published_s"][row.precision]
        figures = {
            "scope": row.name,
            "scoring_s": seconds,
            "texts_per_s": scoring["texts"] / seconds,
            "plain_forward_s": plain,
            "published_s": published_s,
            "cost_in_plain_forwards": ratio(times, plain_times),
            "repetitions_s": times,
            "plain_repetitions_s": plain_times,
            **scoring["work"][row.precision].rates(seconds, plain, scoring["forwards"][row.name], scoring["mean_samples"][row.name]),
            "speedup_vs_published": published_s / seconds,
            "mean_samples": scoring["mean_samples"][row.name],
            "agreement_with_all": scoring["agreement"].get(row.name),
            "agreement_all_vs_all": scoring["agreement_all_vs_all"],
            "end_to_end_speedup": None,
            "student_accuracy": None,
            "peak_bytes": scoring["peaks"].get(row.name),
        }
        if students is not None:
            accuracies, spent = students
            published_training_s = spent[f"published, {row.precision}"]
            figures |= {
                "end_to_end_speedup": (published_s + published_training_s) / (seconds + spent[row.name]),
                "student_accuracy": statistics.mean(accuracies[row.name]) if accuracies[row.name] else None,
                "student_accuracies": accuracies[row.name],
                "student_accuracy_published": statistics.mean(accuracies["published"]) if accuracies["published"] else None,
                "student_accuracies_published": accuracies["published"],
                "training_s": spent[row.name],
                "published_training_s": published_training_s,
            }
        rows.append(figures)
    return rows


def table(rows: list[dict]) -> str:
    shown = {
        "scope": "{}", "scoring_s": "{:.2f}", "texts_per_s": "{:.1f}", "plain_forward_s": "{:.2f}", "published_s": "{:.1f}",
        "cost_in_plain_forwards": "{:.2f}", "mc_tokens_per_s": "{:,.0f}", "share_of_gemm": "{:.1%}", "plain_share_of_gemm": "{:.1%}",
        "speedup_vs_published": "{:.1f}", "mean_samples": "{:.2f}", "agreement_with_all": "{:.1%}",
        "agreement_all_vs_all": "{:.1%}", "peak_bytes": "{:,}", "end_to_end_speedup": "{:.1f}", "student_accuracy": "{:.1%}",
        "student_accuracy_published": "{:.1%}",
    }  # fmt: skip
    return markdown_table(rows, shown)


def note(args: argparse.Namespace, texts: TextSet, paths: list[str], students: tuple[dict, dict] | None) -> str:
    """What the table's figures are of."""
    count = len(texts.texts)
    told = f"{count} texts, {len(paths)} teachers, K = {args.samples}, {args.repetitions} interleaved repetitions."
    told += " On a GPU: every row ran once before; peaks are of its memory." if args.device == "cuda" else ""
    if args.precisions != ["fp32"]:
        told += " Plain and published forwards of a row are in its precision; published students were taught by fp32 teachers."
        told += " Both students' steps are timed in it, too." if args.device == "cuda" else ""
    if args.published_texts < count:
        told += f" Published scoring timed on {args.published_texts} texts and scaled, plus loading its teachers once."
    if students is None:
        return told
    told += f" Published training timed on {args.published_steps} steps and scaled."
    told += " End to end is scoring plus the median training from its scores, which compiles, saves and exports as well."
    if not students[0]["published"]:
        return told
    spread = "; ".join(f"{name} {', '.join(f'{value:.1%}' for value in values)}" for name, values in students[0].items())
    told += " Published students are trained over all steps, on batches padded to their longest text."
    return f"{told} Student accuracy by seed: {spread}."


def page(rows: list[dict], told: str) -> str:
    return f"# muka_fast against the published procedure\n\n{told}\n\n{table(rows)}"


def write_unfinished(args: argparse.Namespace, rows: list[dict], told: str) -> None:
    """Rewrites the file with what is measured so far, for a run that is cut off."""
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    else:
        keep(args.stem, rows, page(rows, f"Unfinished. {told}"), args.device)


def main() -> None:
    args = parse_arguments()
    paths = prepare(args)
    texts = read_texts(args.train, limit=args.texts)
    if args.peak_of:
        print_peak(args, texts)
        return
    if args.scaling:
        from scaling import measure_scaling

        show("scaling", *measure_scaling(args, texts), args.device, args.json)
    else:
        evaluation = read_texts(args.eval, need_labels=True)
        space = build_label_space([(Path(p).name, load_teacher(p, run_seed=0).labels) for p in paths], None)
        with tempfile.TemporaryDirectory() as stores:
            scoring = measure_scoring(args, paths, texts, Path(stores))
            rows, told = rows_of(args, scoring, None), note(args, texts, paths, None)
            write_unfinished(args, rows, told)
            for students in measure_students(args, paths, texts, evaluation, space, Path(stores)) if args.seeds else ():
                rows, told = rows_of(args, scoring, students), note(args, texts, paths, students)
                write_unfinished(args, rows, told)
        for row, figures in zip(args.rows, rows, strict=True):
            figures["peak_bytes"] = figures["peak_bytes"] or peak_bytes(paths, row, args.samples)
            write_unfinished(args, rows, told)
        show(args.stem, rows, page(rows, told), args.device, args.json)


if __name__ == "__main__":
    sys.exit(command(main))
