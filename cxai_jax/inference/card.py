"""The model card of a bundle, written from what the run measured."""

from cxai_jax.report.scores import (
    SCORES,
    groups,
    operating_point,
    percent,
    with_interval,
)

LIMITS = """\
- Research tool, not a medical device. Not for diagnosis or treatment.
- The scores hold for images like those it was tested on. Score it on your own before
  use: `cxai-train --mode=eval --on=NAME --workdir=RUN`.
- A class map shows where evidence was read, not why.
- It always answers with one of its classes, whatever the image shows; `cxai-predict`
  flags images that were trained on or lie outside the range of the training images."""


def model_card(about: dict) -> str:
    """Markdown: data, split, leakage, scores with intervals, thresholds, limits.

    Args:
      about: `data`, `config`, `step` and, of a scored run, `metrics`, `calibration`,
        `pretrained`, `versions`, as in results.json.
    """
    data, config = about["data"], about["config"]
    tested = about.get("tested", data)
    leakage = tested.get("leakage", {}).get("verdict", "not examined")
    counts = ", ".join(f"{n} {split}" for split, n in data.get("counts", {}).items())
    weights = about.get("pretrained", {}).get("source") or "none, trained from scratch"
    lines = [
        "---",
        "library_name: cxai-jax",
        "pipeline_tag: image-classification",
        "tags: [chest imaging, class activation maps, research only]",
        "---",
        "",
        f"# {config['model']['name']} on {data.get('name', config['data']['name'])}",
        "",
        "Trained with cxai_jax. Predict with `cxai-predict --model=DIR --images ...`.",
        "",
        f"- Classes: {', '.join(data['class_names'])}; positive class: "
        f"{data['positive']}.",
        f"- Sites: {', '.join(data['site_names'])}.",
        f"- Images: {counts or 'unknown'}; split: "
        f"{data.get('split_scheme', 'unknown')}.",
        f"- Leakage check: {leakage}.",
        f"- Input: gray, {config['data']['image_size']} x "
        f"{config['data']['image_size']} pixels. Pretrained weights: {weights}.",
        f"- Trained for {about['step']} steps, seed {config['seed']}.",
    ]
    lines += ["", *_scores(about), *_thresholds(about), "## Limits", "", LIMITS, ""]
    return "\n".join(lines)


def _scores(about: dict) -> list[str]:
    if "metrics" not in about:
        return ["The run was not scored.", ""]
    lines = [
        "## Scores",
        "",
        f"On {about.get('tested', about['data'])['name']}, percent with the 95 % "
        "bootstrap interval.",
        "",
        "| | images | " + " | ".join(SCORES.values()) + " |",
        "|---" * (len(SCORES) + 2) + "|",
    ]
    for name, values in groups(about["metrics"]):
        cells = [with_interval(values, key) for key in SCORES]
        lines.append(f"| {name} | {values['number']} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _thresholds(about: dict) -> list[str]:
    fitted = about.get("calibration")
    if not fitted:
        return ["No validation split was held out: it has no fitted thresholds.", ""]
    lines = [
        f"Fitted on {fitted['held_out']} validation images: temperature "
        f"{fitted['temperature']:.2f}.",
        "",
        "| wanted: threshold | sensitivity | specificity |",
        "|---|---|---|",
    ]
    for point in fitted["operating_points"]:
        cells = [
            operating_point(point),
            percent(point["sensitivity"]),
            percent(point["specificity"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]
