"""Provider dialects: what a request asks for, and what the bytes of an answer mean. Sans-io."""
