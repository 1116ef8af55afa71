"""What an auditor makes of a verified ledger: :mod:`watch` follows it, :mod:`report` sums it up."""
