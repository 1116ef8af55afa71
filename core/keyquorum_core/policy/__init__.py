"""Policies in Cedar: one schema, two seats, decisions that name what decided (DESIGN §6 step 4, docs/spec/policy.md).

Read :mod:`~keyquorum_core.policy.seat` first: what may be asked. Then ``facts`` and ``requests`` (about what),
``policies`` and ``bundle`` (by which rules), ``engine`` (the decision), ``explain`` (why).
"""
