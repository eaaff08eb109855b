"""Which schedule of generation and training suits a run: a simulation of its servers, response by response.

`workload` draws prompts and the lengths of their responses, `decoding` says how long a decoding step takes, `server`
and `cluster` run the events, `books` keeps what dynamic sampling keeps, `rounds`, `colocated` and `dedicated` are the
schedules, `comparison` runs them for a plan, `fill` says how stale tokens must be, `calibration` takes what a run has
measured, and `table` prints it all.
"""
