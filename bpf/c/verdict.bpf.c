// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * The verdict on every segment that arrives on an offloaded socket: forward it to the other socket of
 * the pair. Runs once for each skb, from tcp_read_skb, under the lock of the receiving socket.
 *
 * Never redirects an empty skb (a bare FIN would end the other socket's egress), never forwards a byte
 * twice, and leaves to user space what it cannot forward.
 */
#include <linux/bpf.h>
#include <linux/types.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "abi.h"
#include "kernel.h"

/* sk_skb_adjust_room refuses more than this at once (net/core/filter.c, 6.12). */
#define TRIM_STEP 4095
/* An overlap is smaller than the largest skb: 64 KiB, or 512 KiB with BIG TCP. */
#define TRIM_STEPS 129

/* The sockets whose data the program sees. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} sources SEC(".maps");

/* The same sockets as targets of a redirect; no program is attached here. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} targets SEC(".maps");

/* Socket cookie -> index of its flow. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2);
	__type(key, __u64);
	__type(value, __u32);
} indices SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct flow);
} flows SEC(".maps");

/* By CPU; shared by the programs of all worker slots. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cpu_total);
} totals SEC(".maps");

/* The first sequence number of the skb: TCP_SKB_CB(skb)->seq is the first word of its control block. */
static __always_inline __u32 segment_seq(struct __sk_buff *skb)
{
	__u32 seq = 0;

	bpf_probe_read_kernel(&seq, sizeof(seq), (void *)skb + bpf_core_field_offset(struct sk_buff, cb));
	return seq;
}

/*
 * Where the stream stands when the first segment is seen: nothing before copied_seq is in the receive
 * queue unread, because user space read it before it handed the socket over.
 */
static __always_inline int start(struct __sk_buff *skb, struct flow *flow)
{
	struct bpf_sock *sk = skb->sk;
	struct tcp_sock *tp;

	if (!sk)
		return -1;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return -1;
	flow->next_seq = tp->copied_seq;
	flow->flags |= FLOW_STARTED;
	return 0;
}

/*
 * Cuts off what was forwarded before: tcp_data_queue may queue a segment that begins before rcv_nxt,
 * and tcp_read_skb hands it over whole.
 */
static __always_inline int trim(struct __sk_buff *skb, __u32 overlap)
{
	for (int i = 0; i < TRIM_STEPS && overlap; i++) {
		__u32 step = overlap < TRIM_STEP ? overlap : TRIM_STEP;

		if (bpf_skb_adjust_room(skb, -(__s32)step, 0, 0))
			return -1;
		overlap -= step;
	}
	return overlap ? -1 : 0;
}

SEC("sk_skb/stream_verdict")
int verdict(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	__u32 *index = bpf_map_lookup_elem(&indices, &cookie);
	struct cpu_total *total;
	struct flow *flow;
	__u32 key, cpu, direction;
	__s32 overlap;

	if (!index)
		return SK_PASS;
	key = *index;
	direction = key & 1;
	flow = bpf_map_lookup_elem(&flows, &key);
	if (!flow)
		return SK_PASS;
	if (!skb->len)
		return SK_DROP;
	if (!(flow->flags & FLOW_STARTED) && start(skb, flow))
		return SK_PASS;

	overlap = (__s32)(flow->next_seq - segment_seq(skb));
	if (overlap < 0) {
		flow->flags |= FLOW_GAP;
		return SK_PASS;
	}
	if (overlap) {
		__u32 cut = (__u32)overlap < skb->len ? (__u32)overlap : skb->len;

		if (trim(skb, cut)) {
			flow->flags |= FLOW_TRIM_FAILED;
			return SK_PASS;
		}
		flow->trimmed_bytes += cut;
		if (!skb->len)
			return SK_DROP;
	}

	key ^= 1;
	if (bpf_sk_redirect_map(skb, &targets, key, 0) != SK_PASS) {
		flow->flags |= FLOW_NO_TARGET;
		return SK_PASS;
	}
	flow->next_seq += skb->len;
	flow->forwarded_bytes += skb->len;
	flow->last_active_ns = bpf_ktime_get_coarse_ns();

	cpu = bpf_get_smp_processor_id();
	total = bpf_map_lookup_elem(&totals, &cpu);
	if (total)
		__sync_fetch_and_add(&total->forwarded_bytes[direction], skb->len);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
