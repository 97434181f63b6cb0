"""Write the JSON Schema of a batch's manifest, docs/batch.schema.json: `python docs/make_batch_schema.py`."""

from __future__ import annotations

import json
from pathlib import Path

from adapt_convert.convert.batch.manifest import schema

Path(__file__).with_name("batch.schema.json").write_text(json.dumps(schema(), indent=1) + "\n")
