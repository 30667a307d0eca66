"""What figures are reported with."""

import torch

from fastconv.measure import environment


def test_environment():
    facts = environment.facts()
    assert torch.__version__ in facts["versions"]
    assert facts["CPU"].endswith(f"{torch.get_num_threads()} threads")


def test_the_commit_without_git(monkeypatch):
    """Of a checkout without git beside it the environment says it."""
    monkeypatch.delenv("FASTCONV_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert environment.facts()["commit"] == "unknown"
    monkeypatch.setenv("FASTCONV_COMMIT", "abc123")
    assert environment.facts()["commit"] == "abc123"
