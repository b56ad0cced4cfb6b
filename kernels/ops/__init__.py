"""muka_fast.ops: the fused ops, one per file; importing this registers them with torch.library."""
