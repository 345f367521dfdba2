"""The tabs of the page.

A tab each: `generate`, `fill`, `instruct` (edits by instruction), `edit`, `lora`, `scan` and `film`. The
`history` stands below all of them. `steered` is what `fill` and `instruct` have in common.

Parts of tabs: `controls` are a run's buttons and status line, `runs` does the run, `shown` shows its images,
and `edits_shown` those of edits; `fields` are settings that several tabs have, `dose` those of edits, `train`
those of a training; `source` is a place for an image, `steering_image` for one that steers a run.
"""
