"""The keyquorum GPU worker: the process inside the attested enclave.

It makes its keys in memory, shows evidence, combines the custodians' shares into the job's key, decrypts the bundle
into a private folder, runs the job in a jail and hands back encrypted results under a signed statement.
"""
