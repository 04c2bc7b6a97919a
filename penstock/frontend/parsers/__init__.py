"""Taking answers apart into reasoning, content and tool calls, without a model server's libraries."""
