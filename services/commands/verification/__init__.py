"""What `twinlens verify` compares a running system with: reference implementations on the CPU.

They share no code with the services that compute, so that one mistake cannot hide in both.
"""
