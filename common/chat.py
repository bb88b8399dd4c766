"""What the gateway and preprocess both know about chat messages."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The roles that a message may have, and the role that the chat template sees for each.

"developer" is a later name of "system", which chat templates do not know.
"""
