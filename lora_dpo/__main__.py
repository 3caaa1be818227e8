"""`python -m lora_dpo` is the same as `lora-dpo`."""

import sys

from lora_dpo.cli.commands import main

sys.exit(main())
