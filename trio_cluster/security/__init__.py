"""Who a node is and whom it trusts: certificates, the cluster's authority, invitations, and contexts for TLS."""
