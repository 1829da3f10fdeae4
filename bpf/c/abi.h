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
	FLOW_RUNAWAY = 16,	/* the source should have been held back long ago, and still sends */
	FLOW_KICKED = 32,	/* user: the source's lock is held, for what waits in its receive queue to be forwarded */
	FLOW_NARROW = 64,	/* the worker was told that its target's send buffer is too small */
};

/* Whether a flow's source is held back. */
enum flow_pause {
	PAUSE_OFF,		/* it is forwarded */
	PAUSE_WANTED,		/* too much is outstanding; the source leaves `sources` at its next ACK */
	PAUSE_ON,		/* the source is no longer in `sources`; its receive window closes */
};

/*
 * One direction of one pair, at index 2 * pair + direction: what the socket of that index sent us.
 * Direction 0 is the downstream socket's (to_upstream), 1 the upstream socket's. The other socket is at
 * index ^ 1. Fields marked "user" are written by user space only, before the pair is joined.
 */
struct flow {
	__u64 cookie;		/* user: of the socket, 0 while the pair is free or its sockets are about to be closed */
	__u64 forwarded_bytes;	/* redirected to the other socket */
	__u64 last_active_ns;	/* CLOCK_MONOTONIC (coarse), of the last redirect */
	__u64 trimmed_bytes;	/* cut off because they had been forwarded before */
	__u32 next_seq;		/* the sequence number expected next */
	enum flow_flag flags;
	__u32 acked_base;	/* user: bytes_acked of the target when all that was sent before the flow is acknowledged, low 32 bits */
	__u32 high_bytes;	/* user: outstanding bytes above which the source is held back */
	__u32 low_bytes;	/* user, anew at each look: outstanding bytes below which it is let go */
	enum flow_pause pause;	/* user space turns it off when it resumes the source */
	__u32 wake;		/* user space is to be told when few enough are outstanding */
	__u32 pauses;		/* times that the source was held back */
	__u32 largest_outstanding_bytes;
	__u32 lane;		/* user: the ring buffer of its worker; none there: the worker looks by itself */
	__u32 held_bytes;	/* what it stands for in the slot's sum (struct slot_total) */
	__u32 runaway_bytes;	/* user: outstanding bytes that no source reaches that can be held back; 0 = not known */
	__u64 indexed_cookie;	/* what stands for it in `indices`; a stale one is replaced by the next `join` */
	__u32 queued;		/* segments that the target's TCP had not taken when a small one came last */
	__u32 small;		/* the last segment was small */
	__u32 gather;		/* small segments gather: the source is held back for that, or user space copies them by now */
	__u32 window_bytes;	/* user: the largest receive window of the source */
	__u32 settable_bytes;	/* user: the largest buffer that the kernel lets anyone ask for, either way */
	__u32 narrowed;		/* less than that is announced now */
	__u32 tick;		/* when a small segment came last behind another, CLOCK_MONOTONIC in units of 2^20 ns */
	__u32 tick_segments;	/* how many such have come in that tick; TICK_CROWDED */
	__u32 crowded_ticks;	/* in the present period */
	__u32 period_start;	/* its first tick */
};

/*
 * What `join` is asked for: the context that it is run with. Descriptors are those of the process that runs it.
 */
struct join_request {
	__u64 cookies[2];	/* of both sockets, downstream first */
	__s32 sockets[2];
	__s32 sources;		/* the maps */
	__s32 targets;
	__s32 places;
	__u32 index;		/* of the downstream socket */
	__u32 wanted;		/* a bit for each of the two: it is to be a source */
	__u32 pad;
};

/* What `join` answers, if not the negative error number of the step that failed. */
enum join_answer {
	JOIN_WANTED,		/* as wanted */
	JOIN_TO_UPSTREAM_ONLY,	/* the upstream socket could not become a source; the downstream socket is one */
};

/* Counted on one CPU, whole program; bytes by direction. One cache line. */
struct cpu_total {
	__u64 forwarded_bytes[2];
	__u64 pauses;		/* times that a source was held back */
	__u32 tick;		/* as in struct flow, of all flows */
	__u32 tick_segments;
	__u64 pad[4];
};

/* What all flows of one worker slot have in common. One cache line. */
struct slot_total {
	__u64 held_bytes;	/* outstanding in all flows that have more than FLOW_FLOOR outstanding */
	__u64 limit_bytes;	/* user: above this, such flows are held back; 0 = no limit */
	__u64 low_bytes;	/* user: below this, they are let go again */
	__u64 pauses;		/* times that a source of the slot was held back */
	__u32 wake;		/* somebody waits until less than low_bytes are held */
	__u32 lost_events;	/* for which there was no room in a ring buffer of the slot */
	__u32 counted;		/* a worker was told that there is something to count anew now and then; user: no more */
	__u32 pad[5];
};

/*
 * What a segment that the target's TCP has not taken costs the kernel beside its bytes: a sk_buff and the head of its
 * data (measured: 1062 bytes, with segments of one byte). What is taken is put together.
 */
enum segment_cost {
	SEGMENT_COST = 1024,
	SMALL_SEGMENT = 2 * SEGMENT_COST,	/* below this that is no less than half as much as the bytes are */
};

/*
 * A flow's small segments are gathered and copied where they come faster than is good for the kernel thread, which takes them one by
 * one: where for a good part of the time many wait for the target's TCP although it has space, or come so fast that
 * it does little else. What has waited behind a hole comes in a burst, too, but that is over in a tick or two; and a
 * question that has its answer before the next one waits for nobody.
 */
enum crowd {
	CROWD_WAITING = 32,	/* so many wait, */
	CROWD_SEGMENTS = 64,	/* or so many have come on the CPU in a tick, */
	CROWD_OWN = 8,		/* so many of them in the flow, */
	CROWD_TICKS = 12,	/* in so many ticks, */
	CROWD_PERIOD = 128,	/* out of so many */
	TICK_CROWDED = 1 << 30,	/* the present tick is counted */
};

/*
 * Bytes that every flow may have outstanding, whatever the others have: so no flow waits for another one's
 * reader. It is also what a flow has to have before it counts.
 */
enum flow_floor {
	FLOW_FLOOR = 64 * 1024,
};

/* Where a socket stands: the value of its socket storage, put there when its pair is joined. */
struct place {
	__u32 slot;		/* the worker slot */
	__u32 index;		/* in the slot's maps */
};

/* What the programs tell the slot's worker, through its ring buffer. */
enum event_kind {
	EVENT_PAUSED = 1,	/* a source is held back from now on */
	EVENT_DRAINED = 2,	/* few enough bytes are outstanding: the source may be let go */
	EVENT_TROUBLE = 3,	/* a flag was set that a session must not survive */
	EVENT_ROOM = 4,		/* the slot holds few enough bytes again; index says nothing */
	EVENT_LOST = 5,		/* events were lost (slot_total.lost_events); index says nothing */
	EVENT_HELD = 6,		/* the slot has bytes outstanding, and nobody counts them anew (slot_total.counted) */
	EVENT_NARROW = 7,	/* the target has too small a send buffer for what is outstanding; only the master can give it more */
};

struct event {
	__u32 index;		/* of the flow */
	enum event_kind kind;
};

/* Whether a worker slot may be given new connections. Those after the first absent one are absent too. */
enum accept_state {
	ACCEPT_ABSENT,		/* the configuration has no such slot */
	ACCEPT_WAITING,		/* it has sockets and no worker that serves: connections would wait there */
	ACCEPT_LIVE,		/* its worker serves */
};

/*
 * How much a worker slot carries; what `choose` (accept.bpf.c) goes by. What is on its way to a worker is
 * `started` less `taken`. Fields marked "master" and "worker" are written by these.
 */
struct accept_slot {
	enum accept_state state;	/* master */
	__u32 sessions;		/* worker: that it holds */
	__u32 room;		/* worker: how many more it can hold */
	__u32 started;		/* connections that were sent to the slot */
	__u32 taken;		/* worker: connections that it has accepted; program: that never came */
	__u32 aged_started;	/* `started` at aged_ns */
	__u64 aged_ns;		/* when it was last looked for connections that never came */
	__u64 pad[4];
	__u64 cpus[16];		/* master: the CPUs that its worker is pinned to, a bit each */
};

#endif
