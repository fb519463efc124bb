"""A page in the browser: samples that grow scale by scale, pictures through the tokenizer, editing by painting a mask.

    pip install 'gradio>=6'
    python scripts/page.py

Shows the runs below --runs; nothing leaves this machine, unless --host or --share say so.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pages.drawing import checkpoints_below, load, usable
from utils import cli
from utils.cli import flag

INSTALL = "pip install 'gradio>=6'"


@dataclass(frozen=True)
class PageConfig:
    """Flags of scripts/page.py."""

    runs: str = flag("out", "folder below which transformers are looked for")
    ckpt: str = flag("", "a transformer besides: run, checkpoint, or name on the hub")
    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0: for everybody who can reach this machine")
    port: int = flag(7860, "port to listen at")
    share: bool = flag(False, "let Gradio lend a public address, for three days")

    def __post_init__(self):
        if not 0 < self.port < 1 << 16:
            raise ValueError(f"--port={self.port}: give 1 to {(1 << 16) - 1}")


def to_choose_from(config: PageConfig) -> list[str]:
    """Transformers that can be had, the one to begin with first. ValueError and OSError where --ckpt, or none, can be."""
    if config.ckpt:
        load(config.ckpt)
    given = [*([config.ckpt] if config.ckpt else []), *checkpoints_below(Path(config.runs))]
    found = usable(given)
    if given and not found:
        raise ValueError(f"--runs={config.runs}: no transformer there can be used: mend one of them, or give --ckpt")
    return found


def main() -> None:
    config = cli.parse(PageConfig, __doc__)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        from scripts.pages.layout import THEME, build
    except ImportError as error:
        raise ValueError(f"the page needs the package gradio: {INSTALL} ({error})") from error
    page = build(to_choose_from(config), config.runs)
    try:
        where = {"server_name": config.host, "server_port": config.port, "share": config.share}
        page.queue(default_concurrency_limit=1).launch(**where, theme=THEME, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise ValueError(f"--port={config.port}: cannot be listened at ({error}): give another one") from error
    print(f"the page is at http://{config.host}:{config.port}: end it with Ctrl-C", flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli.run(main)
