"""`sparsity-audit tokens`: what two models say, token by token."""

from __future__ import annotations

import click

from sparsity_audit.cli.tokens_critical_command import critical
from sparsity_audit.cli.tokens_cross_command import cross_sample
from sparsity_audit.cli.tokens_diverge_command import diverge
from sparsity_audit.cli.tokens_patch_command import patch
from sparsity_audit.cli.tokens_series_command import series

__all__ = ["tokens"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def tokens() -> None:
    """Compare what two models say, token by token: any two causal models of one vocabulary, or the lab's.

    \b
    Example:
      sparsity-audit tokens diverge mix mix --task addition --num-prompts 8
    """


tokens.add_command(diverge)
tokens.add_command(cross_sample)
tokens.add_command(critical)
tokens.add_command(patch)
tokens.add_command(series)
