"""Where tests find the rest of the project."""

from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]
TOOLS = ROOT / "tools"
EXAMPLES = ROOT / "examples"
ARCHITECTURES = SUPPORT / "architectures"  # config.json files of large released models
SHARED = ROOT.parent / "shared"  # material beside the checkout; tests that need it are skipped where it is absent
