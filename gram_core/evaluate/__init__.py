"""The harness: every method on the same images, views, texts and towers, in one fair table.

`python -m gram_core.evaluate --help`. `data` and `suites` read labelled images, `corruptions` disturbs them, `features`
computes and keeps what the towers say, `protocols` draws requests, `methods` answers them, `readout` turns answers into
figures and `report` shows them.
"""
