"""The README's examples run, and each of two headings opens with one command."""

import re
from pathlib import Path

import jax.numpy as jnp

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_minimise_their_loss():
    starts = (
        ({"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}, 2e-2),
        (jnp.zeros((64, 64)), 1e-5),
        ({"w": jnp.ones((4, 3)), "b": jnp.ones(4)}, 1e-6),
    )
    names = {}
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for example, (start, share) in zip(examples, starts, strict=True):
        exec(example, names)
        assert names["loss"](names["params"]) < share * names["loss"](start)


def test_each_heading_opens_with_one_command():
    for heading in ("Run it", "Test it"):
        section = README.split(f"\n## {heading}\n")[1]
        assert section.lstrip().startswith("```bash\n")
        assert len(section.split("```")[1].strip().splitlines()) == 2  # "bash", command
