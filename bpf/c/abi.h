/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The only definition of every type that the programs and user space share. `bpf/src/abi.rs` mirrors it
 * with atomics and asserts sizes and offsets at compile time.
 */
#ifndef CULVERT_ABI_H
#define CULVERT_ABI_H

/* What a flow has met; bits of flow.flags. */
enum flow_flag {
	FLOW_STARTED = 1,	/* next_seq is valid */
	FLOW_GAP = 2,		/* a segment began after next_seq: bytes are missing */
	FLOW_NO_TARGET = 4,	/* the other socket was not in the map: bytes were left to user space */
	FLOW_TRIM_FAILED = 8,	/* bytes that were forwarded before could not be cut off */
};

/*
 * One direction of one pair, at index 2 * pair + direction: what the socket of that index sent us.
 * Direction 0 is the downstream socket's (to_upstream), 1 the upstream socket's. The other socket is at
 * index ^ 1. Fields marked "user" are written by user space only.
 */
struct flow {
	__u64 cookie;		/* user: of the socket, 0 while the pair is free */
	__u64 forwarded_bytes;	/* redirected to the other socket */
	__u64 last_active_ns;	/* CLOCK_MONOTONIC (coarse), of the last redirect */
	__u64 trimmed_bytes;	/* cut off because they had been forwarded before */
	__u32 next_seq;		/* the sequence number expected next */
	enum flow_flag flags;
	__u32 owner;		/* user: the worker that holds the pair (at even indices), 0 = free */
	__u32 pad;
	__u64 reserved[2];
};

/* Bytes forwarded on one CPU, whole program, by direction. One cache line. */
struct cpu_total {
	__u64 forwarded_bytes[2];
	__u64 pad[6];
};

#endif
