"""The README's examples run and print what it says; its two commands come first."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_print_what_is_shown_and_minimise_their_loss():
    field, network = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    names, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(field, names)
    # The exponents of losses: the last digits differ from one machine to another.
    digits = re.compile(r"\d\.\d(?=e)")
    assert digits.sub("", printed.getvalue()) == digits.sub("", shown)
    exec(network, names)
    assert names["loss"](names["params"]) < 1e-2


def test_each_heading_opens_with_one_command():
    for heading in ("Run it", "Test it"):
        section = README.split(f"\n## {heading}\n")[1]
        assert section.lstrip().startswith("```bash\n")
        assert len(section.split("```")[1].strip().splitlines()) == 2  # "bash", command


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    local = [link for link in links if "://" not in link]
    assert local and all((ROOT / link).exists() for link in local)


def test_it_stays_short():
    assert len(README.splitlines()) <= 130
    assert len(re.findall(r"\S*\w\S*", README)) <= 900
