"""The only loops over checkpoint bytes: plan, then execute, resumable and in a fixed order."""
