"""Side by side with peers: each file here is a script that measures one thing (`make bench`, docs/benchmarks.md)."""
