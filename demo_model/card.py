"""Write the figures of the model card: what stands between `<!-- name -->` and `<!-- end -->` in its README.

python -m demo_model.card --evaluation demo_model/evaluation.json --card demo_model/README.md
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compression(evaluation: dict[str, Any]) -> str:
    """Bits per byte by domain beside xz."""
    domains = evaluation["domains"]
    rows = [
        [name, str(d["documents"]), f"{d['bytes']:,}", f"{d['bits_per_byte']:.2f}", f"{d['xz_bits_per_byte']:.2f}"]
        for name, d in domains.items()
    ]
    documents, size = (sum(d[key] for d in domains.values()) for key in ("documents", "bytes"))
    xz = sum(d["xz_bits_per_byte"] for d in domains.values()) / len(domains)
    mean = ["**mean of the domains**", str(documents), f"{size:,}", f"**{evaluation['mean_bits_per_byte']:.2f}**"]
    below = sum(d["bits_per_byte"] < d["xz_bits_per_byte"] for d in domains.values())
    heads = ["domain", "documents", "bytes", "bits per byte", "`xz -9e`"]
    return f"{table(heads, [*rows, [*mean, f'{xz:.2f}']])}\n\nBelow `xz` in {below} of {len(domains)} domains."


def positions(evaluation: dict[str, Any]) -> str:
    """Bits per token by position, and what late positions cost the same tokens."""
    data = evaluation["by_position"]
    heads = ["positions", *(f"{first}-{last - 1}" for first, last in data["bins"])]
    row = ["bits per token", *(f"{value:.2f}" for value in data["bits_per_token"])]
    cost, error = data["last_quarter_whole_less_half_window"], data["standard_error"]
    return (
        f"{table(heads, [row])}\n\nWhat stands at a position differs from bin to bin. The last 1,024 tokens of the same"
        f" windows, read with all 3,072 tokens\nbefore them instead of only 1,024, cost {cost:+.3f} bits per token "
        f"(standard error {error:.3f}, {data['windows']} windows)."
    )


def interval(data: dict[str, list[float]], layer: int) -> str:
    return f"{data['estimate'][layer]:.2f} ({data['ci_low'][layer]:.2f} to {data['ci_high'][layer]:.2f})"


def routing(evaluation: dict[str, Any]) -> str:
    """Balance, and what experts tell of domains, beside the untrained seed whose interval reaches highest."""
    trained = evaluation["routing"]["trained"]
    untrained = [data for name, data in evaluation["routing"].items() if name != "trained"]
    layers = range(len(trained["least_used_share"]))
    rows = []
    above = {"mutual_information": 0, "excess": 0}
    for layer in layers:
        row = [f"{trained['max_over_mean']['estimate'][layer]:.2f}", f"{trained['least_used_share'][layer]:.3f}"]
        for measure in above:
            highest = max((data[measure] for data in untrained), key=lambda data: data["ci_high"][layer])
            above[measure] += trained[measure]["ci_low"][layer] > highest["ci_high"][layer]
            row += [interval(trained[measure], layer), interval(highest, layer)]
        rows.append([str(layer), *row])
    heads = ["layer", "most used expert / mean", "share of the least used", "mutual information", "untrained"]
    return (
        f"{table([*heads, 'excess', 'untrained'], rows)}\n\nThe mutual information lies above that of all "
        f"{len(untrained)} untrained models, intervals apart, in {above['mutual_information']} of {len(layers)} layers,"
        f"\nthe excess in {above['excess']} of {len(layers)}. A balanced share of the least used expert would be 0.125."
    )


def cutting(evaluation: dict[str, Any]) -> str:
    """What it costs each domain to cut the expert that it uses most beyond the others."""
    data = evaluation["ablation"]
    rows = [
        [
            name,
            f"{cut['layer']}, {cut['expert']}",
            f"{cut['share']:.2f}",
            *(f"{cut[key]:.3f}" for key in ("rise", "mean_rise_of_others", "highest_rise_of_others")),
        ]
        for name, cut in data.items()
    ]
    heads = ["domain", "layer, expert", "share of the choices there (at most 0.5)", "rise there"]
    above_mean = sum(cut["rise"] > cut["mean_rise_of_others"] for cut in data.values())
    shared = [name for name, cut in data.items() if cut["rise"] <= cut["highest_rise_of_others"]]
    most = f"most of all in {len(data) - len(shared)}" + (f": not in {', '.join(shared)}" if shared else "")
    return (
        f"{table([*heads, 'mean rise of the others', 'highest of them'], rows)}\n\nOn these documents the domain itself"
        f" rises more than the mean of the others in {above_mean} of {len(data)} cases, and {most}. Six documents of a"
        " domain describe and do not test: none of these differences has an interval."
    )


def writing(evaluation: dict[str, Any]) -> str:
    """How the model goes on from the first words of a sample of each domain."""
    return "\n\n".join(f"**{name}**\n\n```text\n{text}\n```" for name, text in evaluation["written"].items())


BLOCKS = {
    "compression": compression,
    "positions": positions,
    "routing": routing,
    "cutting": cutting,
    "writing": writing,
}


def fill(card: str, evaluation: dict[str, Any]) -> str:
    """`card` with the figures of `evaluation` in every block."""
    for name, block in BLOCKS.items():
        text = f"<!-- {name} -->\n\n{block(evaluation)}\n\n<!-- end -->"
        card, found = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _, text=text: text, card, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"The card should have one block {name!r}; it has {found}.")
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", type=Path, required=True, help="what demo_model.evaluate wrote")
    parser.add_argument("--card", type=Path, required=True)
    options = parser.parse_args()
    evaluation = json.loads(options.evaluation.read_text("utf-8"))
    options.card.write_text(fill(options.card.read_text("utf-8"), evaluation), "utf-8")


if __name__ == "__main__":
    main()
