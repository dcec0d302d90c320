"""The peers: other trainers that a suite runs beside this project's scripts, on the same samples."""

from collections.abc import Collection
from dataclasses import dataclass

from tunebench.bootstrap import is_complete
from tunebench.errors import BadInput
from tunebench.frameworks import FRAMEWORKS

# The flags that a peer's job holds (peers/run_peer.py). Any other flag would have no effect.
PEER_FLAGS = frozenset(
    {
        *("model", "weights", "layers", "data", "samples", "skip_bad", "bsz", "steps", "warmup_steps", "paired_halves"),
        *("plan_seed", "lr", "seed", "lora_r", "lora_alpha", "timeout", "out"),
    }
)


@dataclass(frozen=True)
class Peer:
    """A trainer: its `script` in peers/ runs in .venv/`environment`.

    `packed` peers fill rows with samples of their own choice. The others take the plan's batches. `padding_free` peers
    compute no padding.
    """

    framework: str
    script: str
    environment: str
    packed: bool = False
    padding_free: bool = False


PEERS: dict[str, Peer] = {
    "hf-trainer": Peer("torch", "with_transformers.py", "peers"),
    "hf-trainer-grouped": Peer("torch", "with_transformers.py", "peers"),
    "trl-padding-free": Peer("torch", "with_trl.py", "peers", padding_free=True),
    "trl-packed": Peer("torch", "with_trl.py", "peers", packed=True, padding_free=True),
    "torchtune": Peer("torch", "with_torchtune.py", "torchtune"),
    "torchtune-packed": Peer("torch", "with_torchtune.py", "torchtune", packed=True, padding_free=True),
    "llamafactory": Peer("torch", "with_llamafactory.py", "llamafactory"),
    "ms-swift": Peer("torch", "with_ms_swift.py", "swift"),
    "axolotl": Peer("torch", "with_axolotl.py", "axolotl"),
    "paddlenlp-trainer": Peer("paddle", "with_paddlenlp.py", "paddle"),
    "paddlenlp-zero-padding": Peer("paddle", "with_paddlenlp.py", "paddle", packed=True, padding_free=True),
    "paddleformers-trainer": Peer("paddle", "with_paddleformers.py", "paddleformers"),
}


def has_environment(name: str) -> bool:
    """Whether the environment of a framework or of peers is complete and up to date."""
    return is_complete(name, name if name in FRAMEWORKS else f"peers/envs/{name}")


def check_environment(name: str) -> None:
    """Raises `BadInput` where .venv/`name` is not complete. The message names the command that makes it."""
    if not has_environment(name):
        raise BadInput(f"the environment .venv/{name} is not complete; run: bash setup.sh {name}")


def check_peer_flags(given: Collection[str], paired_halves: bool) -> None:
    """Raises `BadInput` where a flag was given that no peer follows, and where the plan has paired halves."""
    for name in sorted(set(given) - PEER_FLAGS):
        raise BadInput(f"--{name.replace('_', '-')}: peers do not follow it; leave it out")
    if paired_halves:
        raise BadInput("peers draw the batches of one pass over the samples; use --no-paired-halves")
