"""From many updates to one model: exact sums, bounds, server optimisers. All pure."""
