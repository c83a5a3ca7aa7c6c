"""Write the tables of the studies, from results.jsonl, into the README here and the main one.

    python tests/miniature/tables.py             # with --check: only tell whether they are current

In the README here a study's table and its claims stand between <!-- study: NAME --> and
<!-- end -->, the table of costs between <!-- costs --> and <!-- end -->. The main README has the
first claim of each study between <!-- claims --> and <!-- end -->.

A run counts once all five seeds have it. Runs of one seed share their data, so rows are compared
seed by seed. A difference is the mean over the seeds, with its standard error. A claim of the paper
agrees if the difference is above 2.78 standard errors, Student's t for 95% and five seeds, differs
if it is below minus that, and is otherwise too close to tell.
"""

import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from run import ROOT, RUNS, STUDIES, Claim, Row, Study, read_results  # noqa: E402

README = Path(__file__).with_name("README.md")
MAIN_README = ROOT / "README.md"
SEEDS = range(5)
STUDENT_T = 2.776  # 95%, two-sided, 4 degrees of freedom


def complete_results() -> dict[tuple[str, int], dict]:
    """Read the results of the runs that all seeds have."""
    results = read_results()
    complete = {}
    for (run, seed), line in results.items():
        if all((run, other) in results for other in SEEDS):
            complete[run, seed] = line
    return complete


def values_of(row: Row, column: str, results: dict) -> dict[int, float]:
    """Return a row's values in a column, by seed."""
    found = {}
    for seed in SEEDS:
        line = results.get((row.run, seed))
        if line:
            found[seed] = line["measured"][row.part + column]
    return found


def with_error(values: list[float], sign: str = "") -> str:
    """Format mean ± standard error of the mean (with n - 1), in percent."""
    mean = f"{100 * statistics.mean(values):{sign}.1f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def cell(column: str, values: list[float]) -> str:
    """Format a column's values; a cost has no error."""
    if not values:
        return "-"
    if column.endswith("a comparison"):
        return f"{statistics.mean(values):.3g}"
    return with_error(values)


def differences(better: dict[int, float], worse: dict[int, float] | float) -> list[float]:
    """Subtract seed by seed."""
    if isinstance(worse, float):
        return [value - worse for value in better.values()]
    return [value - worse[seed] for seed, value in better.items() if seed in worse]


def verdict(values: list[float]) -> str:
    mean = statistics.mean(values)
    bound = STUDENT_T * statistics.stdev(values) / len(values) ** 0.5
    if mean > bound:
        return "agrees"
    return "differs" if mean < -bound else "too close to tell"


def judged(claim: Claim, study: Study, results: dict) -> tuple[str, str]:
    """Return a claim's difference and its verdict, "-" without results."""
    rows = {row.label: row for row in study.rows}
    better = values_of(rows[claim.better], claim.column, results)
    worse = claim.worse
    if not isinstance(worse, float):
        worse = values_of(rows[worse], claim.column, results)
    values = differences(better, worse)
    if len(values) < 2:
        return "-", "-"
    return with_error(values, "+"), verdict(values)


def table(name: str, results: dict) -> str:
    """Format a study: rows down, what was measured across; then its claims."""
    study = STUDIES[name]
    lines = [[f"percent, {len(SEEDS)} seeds", *study.columns, f"{study.compared}: difference"]]
    reference = values_of(study.rows[0], study.compared, results)
    for row in study.rows:
        line = [row.label]
        for column in study.columns:
            line.append(cell(column, list(values_of(row, column, results).values())))
        to_reference = differences(values_of(row, study.compared, results), reference)
        first = row is study.rows[0] or not to_reference
        line.append("" if first else with_error(to_reference, "+"))
        lines.append(line)
    if study.paper:
        lines[0].append(f"paper: {study.paper}")
        for line, row in zip(lines[1:], study.rows):
            line.append(row.paper)
    text = markdown(lines)
    if study.claims:
        text += "\n\n" + claims(study, results)
    return text


def claims(study: Study, results: dict) -> str:
    lines = [["the paper finds", "rows and column", "difference", "here"]]
    for claim in study.claims:
        worse = "guessing" if isinstance(claim.worse, float) else claim.worse
        compared = f"{claim.better} - {worse}, {claim.column}"
        lines.append([claim.text, compared, *judged(claim, study, results)])
    return markdown(lines)


def headlines(results: dict) -> str:
    """Format the first claim of each study, for the main README."""
    lines = [["study", "the paper finds", "difference here", "verdict"]]
    for name, study in STUDIES.items():
        if study.claims:
            claim = study.claims[0]
            lines.append([name, claim.text, *judged(claim, study, results)])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """Format a table; the first line is its head."""
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_needed(runs: set[str]) -> set[str]:
    """Return these runs and those whose artifacts they use."""
    more = {needed for run in runs for needed in RUNS[run].needs} - runs
    return with_needed(runs | more) if more else runs


def costs(results: dict) -> str:
    """Format the minutes of each study with all it needs, two runs at a time, and of all runs."""
    studies = {}
    for name, study in STUDIES.items():
        studies[name] = with_needed({row.run for row in study.rows})
    lines = [["study", "runs", "minutes on two cores"]]
    for name, runs in (studies | {"all": set(RUNS)}).items():
        seconds = [line["seconds"] for (run, _), line in results.items() if run in runs]
        count = len(SEEDS) * len(runs)
        minutes = f"{sum(seconds) / 2 / 60:.0f}" if len(seconds) == count else "-"
        lines.append([name, str(count), minutes])
    return markdown(lines)


def filled_in(readme: str) -> str:
    """Return a README with all tables as results.jsonl has them."""
    results = complete_results()
    whole = {"claims": headlines, "costs": costs}

    def fill(match: re.Match) -> str:
        body = table(match[3], results) if match[3] else whole[match[2]](results)
        return f"{match[1]}\n{body}\n<!-- end -->"

    pattern = r"(<!-- (?:(claims|costs)|study: (\w+)) -->)\n.*?<!-- end -->"
    return re.sub(pattern, fill, readme, flags=re.DOTALL)


if __name__ == "__main__":
    for path in (README, MAIN_README):
        readme = path.read_text()
        if filled_in(readme) != readme:
            if "--check" in sys.argv:
                sys.exit(f"{path}: old tables; run python tests/miniature/tables.py")
            path.write_text(filled_in(readme))
