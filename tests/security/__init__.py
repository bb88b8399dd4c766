"""One test for each attack that the system must withstand; docs/security.md lists the limits."""
