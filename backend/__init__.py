"""The Label Studio side: wire contract, journal, rounds. Reaches the core over HTTP only; importing it loads no torch."""
