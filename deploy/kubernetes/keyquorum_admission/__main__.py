from keyquorum_admission.cli import main

main()
