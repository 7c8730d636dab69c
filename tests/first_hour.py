"""The first hour of a newcomer: what the README says, line by line, then 40 tasks with data of her own in each format.

    python tests/first_hour.py [--short]

The package is built as a wheel and installed outside the repository, beside the libraries of the Python that runs this.
Prints a table of tasks and ends with 1 where one failed. --short takes every fourth task.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = [
    {"text": f"{opening} the {thing} of the river number {number}.", "condition": condition, "value": number}
    for number in range(3)
    for condition, opening in (("plain", "She looked at"), ("polite", "Would you kindly look at"))
    for thing in ("bank", "bend")
]
# What stands in the README for a model of 93 GB, data that is not here, and a server.
STAND_INS = {
    "mistralai/Mixtral-8x7B-v0.1": "demo",
    "pile/*.jsonl.gz": "pile/part.jsonl",
    " --device-map auto": " --overlong truncate --max-length 64",
    "bfloat16;nf4;hqq3;hqq2": "bfloat16;nf4",
    "mmlu --protocol mixtral-paper --data benchmarks/data": "demo --limit 2",
    " --by domain --out": " --out",
    "--by domain": "--by condition",
    "kl=0.05": "kl=0.5",
}
NEEDS_A_SERVER = ("bench http", "bench openrouter")


def install(into: Path) -> None:
    """Build the wheel and unpack it in a folder of its own."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(into / "wheel"), str(ROOT)], check=True)
    [wheel] = (into / "wheel").glob("*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(into / "site"), str(wheel)], check=True)


def main(short: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        install(where)
        (where / "desk").mkdir()
        readme, script = where / "README.md", where / "first_hour.py"
        readme.write_text((ROOT / "README.md").read_text("utf-8"), "utf-8")
        script.write_text(Path(__file__).read_text("utf-8"), "utf-8")
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env = kept | {"PYTHONPATH": str(where / "site"), "HF_HUB_OFFLINE": "1", "MIXLENS_CACHE": str(where / "cache")}
        words = [sys.executable, str(script), "--inside", *(["--short"] if short else [])]
        return subprocess.run(words, cwd=where / "desk", env=env, check=False).returncode


def inside(short: bool) -> int:
    """Run the tasks in this process, in the current folder."""
    import matplotlib as mpl

    import mixlens

    mpl.use("agg")
    installed = Path.cwd().parent / "site"
    assert Path(mixlens.__file__).is_relative_to(installed), "the sources were imported, and not the wheel"
    make_data()
    failed = 0
    chosen = TASKS[:: 4 if short else 1]
    for task in [readme_python, readme_shell, *chosen]:
        began = time.monotonic()
        try:
            with redirect_stdout(io.StringIO()):
                task()
            ended = "ok"
        except BaseException:
            failed, ended = failed + 1, f"FAILED\n{traceback.format_exc()}"
        print(f"{task.__name__.replace('_', ' '):<50} {time.monotonic() - began:6.1f} s  {ended}", flush=True)
    print(f"{len(chosen) + 2 - failed} of {len(chosen) + 2} went well")
    return int(failed > 0)


# -- what the README says


def readme_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", Path("../README.md").read_text("utf-8"), re.DOTALL)
    exec(compile("\n".join(blocks), "README.md", "exec"), {"__name__": "readme"})


def readme_shell() -> None:
    from mixlens.cli.main import app

    shell = "\n".join(re.findall(r"```sh\n(.*?)```", Path("../README.md").read_text("utf-8"), re.DOTALL))
    for line in re.findall(r"^mixlens (.+)$", shell, re.MULTILINE):
        app.parse_args(shlex.split(line), exit_on_error=False, print_error=False)  # as it stands, it is understood
        if not line.startswith(NEEDS_A_SERVER):
            for said, here in STAND_INS.items():
                line = line.replace(said, here)
            command(line)


# -- data as people have it, and helpers of the tasks


def make_data() -> None:
    import datasets
    import pandas as pd

    frame, lines = pd.DataFrame(LINES), "".join(json.dumps(line) + "\n" for line in LINES)
    Path("own.json").write_text(json.dumps(LINES))
    Path("own.jsonl").write_text("\ufeff" + lines.replace("\n", "\n\n"), "utf-8")
    with gzip.open("own.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    frame.rename(columns={"text": "body"}).to_csv("own.csv", index=False)
    frame.to_csv("own.tsv", sep="\t", index=False)
    frame.to_parquet("own.parquet")
    frame.to_feather("own.arrow", compression="uncompressed")
    datasets.Dataset.from_pandas(frame).save_to_disk("own_dataset")
    Path("texts").mkdir()
    for number, line in enumerate(LINES):
        Path(f"texts/{number}.{'md' if number % 2 else 'txt'}").write_text(line["text"])
    turns = [{"role": "user", "content": "Where is the bank?"}, {"role": "assistant", "content": "By the river."}]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": turns, "id": n}) + "\n" for n in range(4)))
    Path("questions.jsonl").write_text(
        '{"start": "Once upon a", "ends": [" time", " stone"], "right": 0}\n'
        '{"start": "He opened the", "ends": [" of", " door"], "right": 1}\n'
    )
    Path("mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: questions.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{start}}"\ntarget_delimiter: ""\ndoc_to_choice: "{{ends}}"\n'
        'doc_to_target: "{{right}}"\nmetric_list: [{metric: acc}]\n'
    )
    Path("pile").mkdir()
    Path("pile/part.jsonl").write_text(lines)


def command(line: str, status: int = 0) -> dict:
    """Run a command of mixlens; its result as it is printed by --json."""
    from mixlens.cli import main as cli

    printed = io.StringIO()
    with redirect_stdout(printed):
        found = cli.main([*shlex.split(line), "--json"])
    assert found == status, f"mixlens {line} ended with {found}: {printed.getvalue()[:500]}"
    return json.loads(printed.getvalue())


def recorded(source: str, options: str = "") -> None:
    """A source is recorded whole, with the columns that it has."""
    import mixlens as ml

    out = f"runs/{re.sub('[^a-z]', '-', source)}"
    found = command(f"record demo {source} --out {out} {options}")
    trace = ml.open(out)
    assert found["documents"] == len(trace.sequences) == (4 if "chats" in source else len(LINES))
    if not source.startswith(("texts", "chats")):
        assert set(trace.sequences["condition"]) == {"plain", "polite"}


def run() -> str:
    """A recording of the own documents, made once."""
    if not Path("runs/base").exists():
        command("record demo own.json --out runs/base")
    return "runs/base"


def model():
    import mixlens as ml

    return ml.load("demo", verbose=False)


def quiet():
    import mixlens as ml

    return ml.RecordSettings(progress=False)


# -- tasks: documents


def record_json() -> None:
    recorded("own.json")


def record_json_lines_with_a_mark_and_blank_lines() -> None:
    recorded("own.jsonl")


def record_compressed_json_lines() -> None:
    recorded("own.jsonl.gz")


def record_csv_by_its_column() -> None:
    recorded("own.csv", "--text body")


def record_tsv() -> None:
    recorded("own.tsv")


def record_parquet() -> None:
    recorded("own.parquet")


def record_arrow() -> None:
    recorded("own.arrow")


def record_a_saved_dataset() -> None:
    recorded("own_dataset")


def record_a_folder_of_texts() -> None:
    recorded("texts")


def record_chats() -> None:
    import mixlens as ml

    recorded("chats.jsonl", "--text messages")
    assert set(ml.open("runs/chats-jsonl").read("phase")) == {0, 1}  # what the assistant said is generated


def record_a_frame_and_strings() -> None:
    import pandas as pd

    import mixlens as ml

    assert len(ml.record(model(), ml.documents(pd.DataFrame(LINES)), settings=quiet()).sequences) == len(LINES)
    assert len(ml.record(model(), [line["text"] for line in LINES], settings=quiet()).sequences) == len(LINES)


def record_an_own_column_called_value() -> None:
    import mixlens as ml

    assert sorted(ml.open(run()).sequences["value"].unique()) == [0, 1, 2]


def look_before_recording() -> None:
    told = command("record demo own.json --out runs/dry --dry-run")
    assert told["documents"] == len(LINES)
    assert not Path("runs/dry").exists()


def record_only_some() -> None:
    assert command("record demo own.json --limit 3 --out runs/three")["documents"] == 3


def record_the_same_again() -> None:
    first = command(f"record demo own.json --out {run()}")
    assert first["tokens"] == command(f"record demo own.json --out {run()}")["tokens"]


def repeat_a_run_from_its_folder() -> None:
    assert command(f"again {run()}")["differ"] == []


# -- tasks: statistics and figures


def shares_by_an_own_column() -> None:
    import mixlens as ml

    share = ml.stats.expert_share(ml.open(run()), by="condition")
    assert abs(share["estimate"].sum("expert") - 1).max() < 1e-9
    ml.show.expert_share(share, layer=0).figure.savefig("share.png")
    assert Path("share.png").stat().st_size > 5_000


def a_statistic_as_csv() -> None:
    import pandas as pd

    command(f"stats {run()} routing_entropy --csv entropy.csv")
    assert {"estimate", "ci_low", "ci_high"} <= set(pd.read_csv("entropy.csv"))


def contrast_two_conditions() -> None:
    found = command(f"contrast {run()} expert_share --by condition --a plain --out contrast.html")
    assert {"p", "q", "survives"} <= set(found["rows"][0])
    assert "plain" in Path("contrast.html").read_text("utf-8")


def a_view_that_can_be_mailed() -> None:
    import mixlens as ml

    ml.view.tokens(ml.open(run()), sequence=0).save("tokens.html")
    assert "<script" in Path("tokens.html").read_text("utf-8")


def a_long_table() -> None:
    import mixlens as ml

    table = ml.open(run()).to_pandas()
    assert {"condition", "document_id", "text", "layer", "slot", "expert_id"} <= set(table)


def a_table_by_duckdb() -> None:
    import duckdb

    asked = f"select condition, count(*) from '{run()}/tokens-*.parquet' join '{run()}/sequences.parquet' "
    assert len(duckdb.sql(asked + "using (sequence) group by condition").fetchall()) == 2


def only_one_condition() -> None:
    import mixlens as ml

    trace = ml.open(run()).select(where={"condition": "plain"})
    assert set(trace.sequences["condition"]) == {"plain"}


def a_report_of_one_run() -> None:
    command(f"report {run()} --out one.html")
    assert Path("one.html").stat().st_size > 100_000


def check_a_run() -> None:
    assert command(f"info {run()} --verify")["verified"] is True


def a_damaged_run_is_named() -> None:
    command("record demo own.json --limit 2 --out runs/damaged")
    file = Path("runs/damaged/tokens-00000.parquet")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "tokens-00000.parquet" in command("info runs/damaged --verify", status=1)["message"]


# -- tasks: the model


def who_is_in_memory() -> None:
    assert command("audit demo")["label"] == "float32"


def forbid_an_expert() -> None:
    from transformers import AutoTokenizer

    import mixlens as ml

    loaded = model()
    text = AutoTokenizer.from_pretrained(loaded.name_or_path)(LINES[0]["text"], return_tensors="pt")
    with ml.Recorder(loaded) as recorder, ml.edit(loaded, ml.edits.forbid(3, 5)):
        loaded(**text)
    assert not (recorder.trace().read("expert_id")[:, 3] == 5).any()


def record_what_it_generates() -> None:
    from transformers import AutoTokenizer

    import mixlens as ml

    loaded = model()
    tokenizer = AutoTokenizer.from_pretrained(loaded.name_or_path)
    with ml.Recorder(loaded) as recorder:
        loaded.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert recorder.trace().select(phase="generated").n_tokens == 4  # no forward saw the last one


def importance_of_a_layer() -> None:
    found = command("importance demo own.json --limit 2 --layers 7 --out runs/importance")
    assert {row["layer"] for row in found["rows"]} == {7}


def quantize_and_compare() -> None:
    found = command("impact demo own.json --limit 4 --quantization nf4 --out runs/impact")
    assert any("perplexity" in row["what"] for row in found["rows"])


def compare_two_precisions() -> None:
    command("record demo own.json --dtype bfloat16 --out runs/rounded")
    assert len(command(f"compare {run()} runs/rounded")["rows"]) > 3


def refuse_what_does_not_compare() -> None:
    command("record demo own.json --limit 2 --out runs/two")
    assert command(f"compare {run()} runs/two", status=2)["error"] == "BadInput"


# -- tasks: scores, speed, decisions


def score_the_bundled_items() -> None:
    assert command("eval demo demo --limit 2 --csv scores.csv --out runs/scores")["scores"]
    assert Path("scores.csv").exists()


def score_an_own_task() -> None:
    found = command("eval demo mine.yaml --out runs/mine")
    assert found["scores"][0]["n"] == 2


def time_it_here() -> None:
    found = command("bench demo --requests 2 --prompt-tokens 16 --output-tokens 2 --csv speed.csv --out runs/speed")
    assert any(row["metric"] == "ttft_s" for row in found["rows"])


def what_it_costs_elsewhere() -> None:
    assert command("cost --input-tokens 1000 --output-tokens 500")["rows"]


def decide_between_schemes() -> None:
    command("pareto demo own.json --limit 6 --schemes bfloat16 --calls 0 --csv schemes.csv --out runs/few")
    found = command("decide runs/few --max weight_bytes=20MB --csv forms.csv")
    assert found["recommended"] == "bfloat16"
    assert command("decide runs/few --max weight_bytes=1kB", status=1)["recommended"] is None


def one_report_of_everything() -> None:
    for needed in (score_the_bundled_items, time_it_here):
        needed()
    command(f"report {run()} runs/scores runs/speed --out all.html")
    assert Path("all.html").stat().st_size > 100_000


def a_mistake_is_answered_with_a_page() -> None:
    told = command("record demo own.csv --out runs/wrong", status=2)
    assert told["argument"] == "text"
    assert told["guide"].startswith("Guide: file://")
    assert not Path("runs/wrong").exists()


TASKS: list[Callable[[], None]] = [
    record_json, record_json_lines_with_a_mark_and_blank_lines, record_compressed_json_lines, record_csv_by_its_column,
    record_tsv, record_parquet, record_arrow, record_a_saved_dataset, record_a_folder_of_texts, record_chats,
    record_a_frame_and_strings, record_an_own_column_called_value, look_before_recording, record_only_some,
    record_the_same_again, repeat_a_run_from_its_folder, shares_by_an_own_column, a_statistic_as_csv,
    contrast_two_conditions, a_view_that_can_be_mailed, a_long_table, a_table_by_duckdb, only_one_condition,
    a_report_of_one_run, check_a_run, a_damaged_run_is_named, who_is_in_memory, forbid_an_expert,
    record_what_it_generates, importance_of_a_layer, quantize_and_compare, compare_two_precisions,
    refuse_what_does_not_compare, score_the_bundled_items, score_an_own_task, time_it_here, what_it_costs_elsewhere,
    decide_between_schemes, one_report_of_everything, a_mistake_is_answered_with_a_page,
]  # fmt: skip

if __name__ == "__main__":
    sys.exit((inside if "--inside" in sys.argv else main)("--short" in sys.argv))
