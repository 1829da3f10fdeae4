// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Which worker slot gets a new connection. Attached to the group of SO_REUSEPORT sockets of each listening
 * address, of which each slot has one. Loading it takes its time, so it is loaded once for many addresses.
 *
 * `choose` runs when a SYN finds no connection of its own, on the CPU that it arrived on. It prefers the
 * worker that is pinned there, unless that carries much more than its share: then it takes the one that
 * carries least. It runs once more for whatever is left in a listening socket that is closed, queued
 * connections and half-open ones (BPF_SK_REUSEPORT_SELECT_OR_MIGRATE, Linux 5.14), so none is lost.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"

#define SLOTS 256

/* A slot keeps its place on its own CPU up to 5/4 of the mean of all, and this much more. */
#define SLACK 8

/* After this long a connection that was not accepted never will be: its client has given up. */
#define GIVEN_UP_NS 3000000000ULL

/*
 * For each address in turn, by worker slot: its socket. A closed socket leaves it by itself. How many addresses
 * there is room for is said by who loads it.
 */
struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, __u64);
} accept_sockets SEC(".maps");

/* By the cookie of a listening socket: where those of its address begin in accept_sockets. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, SLOTS);
	__type(key, __u64);
	__type(value, __u32);
} accept_addresses SEC(".maps");

/* By worker slot; shared by the programs of all addresses. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, struct accept_slot);
} accept_slots SEC(".maps");

/* How welcome a connection is, best first. */
enum rank {
	RANK_OPEN,		/* the worker takes it at once */
	RANK_FULL,		/* it waits until a session ends */
	RANK_WAITING,		/* it waits for the next worker */
	RANK_NONE,
};

/* What one look at all slots has found. A weight is the rank in the high half and the load in the low. */
struct look {
	__u64 now_ns;
	__u64 home_weight;
	__u64 least_weight;
	__u64 load;		/* of all live slots */
	__u32 live;
	__u32 cpu;
	__u32 home;
	__u32 least;
};

/* Connections that are on their way to the slot's worker. */
static __always_inline __u32 coming(struct accept_slot *slot, __u64 now_ns)
{
	__u64 aged_ns = slot->aged_ns;

	if (now_ns - aged_ns > GIVEN_UP_NS &&
	    __sync_val_compare_and_swap(&slot->aged_ns, aged_ns, now_ns) == aged_ns) {
		__s32 left = (__s32)(slot->started - slot->taken);
		__s32 gone = (__s32)(slot->aged_started - slot->taken);

		/* Taken after all, once they had been given up. */
		if (left < 0)
			gone = left;
		if (gone > 0 || left < 0)
			__sync_fetch_and_add(&slot->taken, gone);
		slot->aged_started = slot->started;
	}
	/* The two are written on different CPUs: the difference may dip below zero for a moment. */
	__s32 left = (__s32)(slot->started - slot->taken);

	return left > 0 ? left : 0;
}

static long look_at(__u32 index, void *context)
{
	struct look *look = context;
	struct accept_slot *slot = bpf_map_lookup_elem(&accept_slots, &index);
	enum rank rank = RANK_WAITING;
	__u32 waiting, load;
	__u64 weight;

	if (!slot || slot->state == ACCEPT_ABSENT)
		return 1;
	waiting = coming(slot, look->now_ns);
	load = slot->sessions + waiting;
	if (slot->state == ACCEPT_LIVE) {
		rank = waiting < slot->room ? RANK_OPEN : RANK_FULL;
		look->load += load;
		look->live++;
	}
	weight = (__u64)rank << 32 | load;
	if (weight < look->least_weight) {
		look->least_weight = weight;
		look->least = index;
	}
	if (slot->cpus[look->cpu / 64 % 16] >> look->cpu % 64 & 1 && weight < look->home_weight) {
		look->home_weight = weight;
		look->home = index;
	}
	return 0;
}

/* Whether the slot of this CPU may have one more. Where nobody serves, the queues are filled evenly. */
static __always_inline int home_is_fair(struct look *look)
{
	__u64 rank = look->home_weight >> 32;

	return rank == look->least_weight >> 32 && rank < RANK_WAITING &&
	       4ULL * look->live * (__u32)look->home_weight <= 5 * look->load + 4ULL * look->live * SLACK;
}

/* Whether this is a client's first word. What else comes to a listening socket opens no connection. */
static __always_inline int is_syn(struct sk_reuseport_md *md)
{
	const __u8 *tcp = md->data;
	const __u8 syn = 0x02, ack = 0x10;

	if ((void *)(tcp + 14) > md->data_end)
		return 0;
	return (tcp[13] & (syn | ack)) == syn;
}

static __always_inline int give(struct sk_reuseport_md *md, __u32 first, __u32 index)
{
	struct accept_slot *slot;
	__u32 place = first + index;

	if (bpf_sk_select_reuseport(md, &accept_sockets, &place, 0))
		return -1;
	slot = bpf_map_lookup_elem(&accept_slots, &index);
	if (slot && (md->migrating_sk || is_syn(md)))
		__sync_fetch_and_add(&slot->started, 1);
	return 0;
}

SEC("sk_reuseport/migrate")
int choose(struct sk_reuseport_md *md)
{
	struct look look = {
		.now_ns = bpf_ktime_get_coarse_ns(),
		.cpu = bpf_get_smp_processor_id(),
		.home_weight = (__u64)RANK_NONE << 32,
		.least_weight = (__u64)RANK_NONE << 32,
	};

	/* Any socket of the group: the one that is closed, when connections move. */
	__u64 cookie = bpf_get_socket_cookie(md->sk);
	__u32 *first = bpf_map_lookup_elem(&accept_addresses, &cookie);

	if (!first)
		return SK_PASS;
	bpf_loop(SLOTS, look_at, &look, 0);
	/* There is no slot yet: as if there were no program, the kernel takes a socket of the group by its hash. */
	if (look.least_weight >> 32 == RANK_NONE)
		return SK_PASS;
	/*
	 * A slot without a socket has just been added or removed. If it is the other's turn and that has none
	 * either, the hash decides as well.
	 */
	if (!home_is_fair(&look) || give(md, *first, look.home))
		give(md, *first, look.least);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
