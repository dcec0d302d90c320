"""Forecasts the public points of tests/data/peaks.json and prints the errors, source by source.

    .venv/torch/bin/python benchmarks/peaks.py

Each point is a LoRA run on one GPU that the flags can express. A source's counter is named and never mixed with
another's.
"""

import argparse
import json
import pathlib
import runpy
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
runpy.run_path(str(ROOT / "tunebench" / "bootstrap.py"))["enter_environment"]("torch")

from tunebench.report.markdown import markdown

COLUMNS = ("Model", "Flags", "Published GB", "Forecast GB", "Error", "What differs")


def main() -> None:
    """Prints a table for each source, with the median and the largest error."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    content = json.loads((ROOT / "tests" / "data" / "peaks.json").read_text())
    for source in dict.fromkeys(point["source"] for point in content["points"]):
        points = [point for point in content["points"] if point["source"] == source]
        lines, errors = [], []
        for point in points:
            found = forecast(content["models"][point["model"]], point)
            words = " ".join([*point["flags"], f"{point['bsz']} x {point['length']}"])
            peak, published = found["memory"]["peak"] / 1e9, point["peak_gb"]
            if published is None:
                lines.append(
                    [point["model"], words, "out of memory", f"{peak:.2f}: {found['verdict']}", "", point["differs"]]
                )
                continue
            errors.append(peak / published - 1)
            shown = [f"{published:.2f}", f"{peak:.2f}", f"{errors[-1]:+.1%}"]
            lines.append([point["model"], words, *shown, point["differs"]])
        print(f"\n{source}; {points[0]['counter']}\n\n{markdown(COLUMNS, lines)}")
        median, largest = statistics.median(map(abs, errors)), max(map(abs, errors))
        print(f"\nmedian {median:.1%}, largest {largest:.1%} of {len(errors)}", flush=True)


def forecast(config: dict, point: dict) -> dict:
    """The answer of the script to --plan, for a folder with the point's config.json alone."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        gpu = "a100-40g" if "40G" in point["source"] else "a100-80g"
        flags = [f"--model={folder}", f"--data=fixed:{point['length']}", f"--bsz={point['bsz']}", f"--gpu={gpu}"]
        flags += [*point["flags"], "--steps=2", "--samples=64", "--plan", f"--out={folder / 'answer.json'}"]
        script = ROOT / "torch" / "finetune_lora.py"
        subprocess.run([sys.executable, str(script), *flags], check=True, capture_output=True)
        return json.loads((folder / "answer.json").read_text())


if __name__ == "__main__":
    main()
