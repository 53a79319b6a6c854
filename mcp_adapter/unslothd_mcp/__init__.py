"""MCP adapter: tool calls in, RPCs out. Holds no state of its own."""
