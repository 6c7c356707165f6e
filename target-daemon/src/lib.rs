//! holdfastd: pool, replica service, heads, front ends, HTTP API.
