from keyquorum_custodian.cli import main

main()
