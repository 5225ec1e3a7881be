/*
 * The protocol of docs/architecture.md, small enough to be looked at whole. README.md says how it maps to the code.
 *
 * Each d_step is one write to MongoDB (a command or a transaction) or one exchange with RabbitMQ: a process may be
 * killed or stopped between any two of them. There is no time: whatever waits for its time may happen at once, or
 * later than everything else. What goes wrong is bounded by FAULTS, of any kinds, at any moments.
 *
 * Every run of the model ends (it has no cycles: `pan -l`), and Judge looks at each end. So every job comes to rest in
 * every run in which what can happen does happen at last.
 */

#ifndef JOBS            /* 1 or 2 */
#define JOBS 1
#endif
#ifndef CHUNK           /* jobs in each of the first messages */
#define CHUNK 1
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef WORKERS         /* 2 or 3 */
#define WORKERS 2
#endif
#ifndef LEADERS         /* of the sweep: 1 or 2 */
#define LEADERS 1
#endif
#ifndef FAULTS
#define FAULTS 1
#endif

/* Messages that something refers to at one time: an assertion says so if they don't suffice. */
#define MESSAGES 6
#define NONE 255
/* In place of a worker: a process, or an incarnation, that is no more. */
#define GONE 254

mtype:job = { PENDING, RETRY_WAITING, TERMINAL, CANCELLED };
mtype:message = { MISSING, OPEN, CLAIMED, CLOSED };
mtype:step = { IDLE, DELIVERED, ASKED, HANDLING, IN_DOUBT, RECORDED, SENT };

/* ---- What MongoDB keeps ---- */

typedef Job {
    mtype:job state = PENDING;
    byte stage;
    byte message = NONE;                    /* the only one that may move it */
    bool recorded[STAGES]
};

typedef Message {
    mtype:message state = MISSING;
    byte stage;
    bool published;
    byte token = NONE;                      /* the worker process that claimed it */
    byte lease = NONE;                      /* the incarnation that covers the claim */
    bool given_back
};

Job job[JOBS];
Message message[MESSAGES];
bool ended[WORKERS];                        /* the record of its incarnation was closed */

/* ---- What RabbitMQ keeps: hints that are ready. What is not acknowledged is in a worker's `holds`. ---- */

bool ready[MESSAGES];
byte in_queue[STAGES];                         /* the same, by queue */

/* ---- Workers, with one slot each, and leaders of the sweep ---- */

typedef Slot {
    mtype:step step = IDLE;
    byte message = NONE;                    /* that it works on */
    byte jobs;                              /* that its claim found in it: a bit for each */
    byte next = NONE;                       /* the message that its record makes */
    bool holds;                             /* its hint is not acknowledged */
    bool doubt;                             /* was stopped, or cut off, and has not renewed its lease since */
    bool for_ever;                          /* and does not come back */
    bool sure                               /* nothing of that kind since its claim; only properties ask for it */
};

typedef Leader {
    byte plan = NONE;                       /* a claim without a lease that it has seen */
    byte sent = NONE                        /* what it published, and has not noted yet */
};

Slot worker[WORKERS];
Leader leader[LEADERS];
byte faults;

/* ---- What must hold: an assertion that fails prints its name ---- */

hidden byte nothing_lost, nothing_left_behind, recorded_once, one_at_a_time, finished_stage_not_run_again;
hidden byte known_before_acknowledged, recorded_before_forwarded, outputs_are_the_recorders, cancelled_for_good;

hidden byte i, j, k, l, fresh, carried, kept;

#define BIT(x)      (1 << (x))
#define AT(w)       worker[w].message
#define RUNS(w)     (!worker[w].for_ever)
#define MINE(w)     (message[AT(w)].state == CLAIMED && message[AT(w)].token == (w))
#define FAULT       (faults < FAULTS)

/* A lease that nobody renews may have run out. */
#ifdef NO_RENEWAL
#define LAPSED(w)   FAULT
#else
#define LAPSED(w)   worker[w].doubt
#endif
#define COVERED(x)  (message[x].lease != GONE && !ended[message[x].lease] && !LAPSED(message[x].lease))

/* The two rules of order are looked away from, to see what comes of it. */
#ifdef NO_ORDER_RULES
#define IGNORED true
#else
#define IGNORED false
#endif

#define EACH_MESSAGE(X) X(0) X(1) X(2) X(3) X(4) X(5)
#if JOBS == 1
#define EACH_JOB(X)     X(0)
#else
#define EACH_JOB(X)     X(0) X(1)
#endif
#if WORKERS == 2
#define EACH_WORKER(X)  X(0) X(1)
#define OTHERS_GO_ON    (worker[0].for_ever + worker[1].for_ever < 1)
#else
#define EACH_WORKER(X)  X(0) X(1) X(2)
#define OTHERS_GO_ON    (worker[0].for_ever + worker[1].for_ever + worker[2].for_ever < 2)
#endif

/* ---- Writes that several share ---- */

/* The name of a closed message that nothing refers to any more is free: so that states that are alike are one. */
inline tidy() {
    for (k : 0 .. MESSAGES - 1) {
        kept = message[k].state != CLOSED || ready[k];
        for (l : 0 .. WORKERS - 1) { kept = kept || worker[l].message == k || worker[l].next == k }
        for (l : 0 .. LEADERS - 1) { kept = kept || leader[l].plan == k || leader[l].sent == k }
        if
        :: !kept -> message[k].state = MISSING; message[k].stage = 0; message[k].token = NONE; message[k].given_back = false
        :: else
        fi
    }
    skip                                    /* spin: a d_step must not end with a loop */
}

#define IS_NEXT(x) (worker[0].next == (x) || worker[1].next == (x) || worker[WORKERS - 1].next == (x))
inline choose_name() {
    fresh = 0;
    do
    :: fresh < MESSAGES && (message[fresh].state != MISSING || IS_NEXT(fresh)) -> fresh++
    :: else -> break
    od;
    assert(fresh < MESSAGES)
}

/* A new message for the jobs in `set`, not published. */
inline enqueue(set, to_stage) {
    choose_name();
    message[fresh].stage = to_stage;
    fill(set)
}

inline fill(set) {
    message[fresh].state = OPEN;
    for (k : 0 .. JOBS - 1) {
        if
        :: (set) & BIT(k) -> job[k].state = PENDING; job[k].stage = message[fresh].stage; job[k].message = fresh
        :: else
        fi
    }
    skip
}

/* A claim that will not be recorded is closed, and each of its jobs goes on alone. One transaction. */
inline give_back(x) {
    if
    :: message[x].state == CLAIMED ->
        message[x].state = CLOSED;
        message[x].given_back = true;
        message[x].lease = NONE;
        for (j : 0 .. JOBS - 1) {
            if
            :: job[j].message == x -> enqueue(BIT(j), job[j].stage)
            :: else
            fi
        }
    :: else                                 /* recorded, or given back by somebody else meanwhile */
    fi
}

inline add(x) {
    if
    :: !ready[x] -> ready[x] = true; in_queue[message[x].stage]++
    :: else                                 /* a second copy makes no difference before the first is taken */
    fi
}

inline take(x) {
    ready[x] = false; in_queue[message[x].stage]--
}

/* Published, with confirm. */
inline put(x) {
    recorded_before_forwarded = IGNORED || message[x].state != MISSING;
    assert(recorded_before_forwarded);
    add(x)
}

inline note(x) {
    message[x].published = (message[x].state == OPEN -> true : message[x].published)
}

inline acknowledge(w) {
    known_before_acknowledged = IGNORED || !worker[w].holds || message[AT(w)].state == CLAIMED ||
        message[AT(w)].state == CLOSED;
    assert(known_before_acknowledged);
    worker[w].holds = false
}

/* Its hint goes back into the queue. */
inline let_go(w) {
    if
    :: worker[w].holds -> add(AT(w)); worker[w].holds = false
    :: else
    fi
}

inline rest(w) {
    worker[w].step = IDLE; AT(w) = NONE; worker[w].jobs = 0; worker[w].next = NONE;
    worker[w].sure = false;
    tidy()
}

/* Nobody holds the old one any more: what it claimed is the sweep's. */
inline new_incarnation(w) {
    for (k : 0 .. MESSAGES - 1) {
        message[k].lease = (message[k].lease == w -> GONE : message[k].lease)
    }
    ended[w] = false; worker[w].doubt = false
}

/* Another process in its place: it shares no token with the old one. */
inline new_process(w) {
    for (k : 0 .. MESSAGES - 1) {
        message[k].token = (message[k].token == w -> GONE : message[k].token)
    }
    rest(w)
}

/* ---- A worker: flow/consume.py, claim.py, record.py, forward.py; worker/lifeline.py ---- */

#ifdef ACK_FIRST
#define ACKNOWLEDGED_ON_DELIVERY(w) acknowledge(w)
#else
#define ACKNOWLEDGED_ON_DELIVERY(w) skip
#endif
#ifdef NO_CAS
#define MAY_CLAIM(w)    (message[AT(w)].state != MISSING)
#else
#define MAY_CLAIM(w)    (message[AT(w)].state == OPEN)
#endif
#ifdef NO_TOKEN
#define MAY_RECORD(w)   (message[AT(w)].state != MISSING)
#else
#define MAY_RECORD(w)   MINE(w)
#endif
#ifdef NO_GUARD
#define NAMED(w, x)     true
#else
#define NAMED(w, x)     (job[x].message == AT(w))
#endif
#define IS_LAST(w)      (message[AT(w)].stage == STAGES - 1)
/* What asking for a record again finds: closed by its own token, and not given back. */
#define RECORDED_BY(w)  (message[AT(w)].state == CLOSED && message[AT(w)].token == (w) && !message[AT(w)].given_back)

/* Whether worker x has every reason to believe that these jobs run nowhere else in this stage. */
#define RUNS_ALONE(x, set, in_stage) (worker[x].step == HANDLING && worker[x].sure && (worker[x].jobs & (set)) && \
    message[AT(x)].stage == (in_stage))

#ifdef LATE_OUTPUT
/* Under a name that does not tell whose it is: over what another may have recorded. */
#define KEEP_OUTPUTS_ALL_THE_SAME(w) \
    for (j : 0 .. JOBS - 1) { \
        outputs_are_the_recorders = RECORDED_BY(w) || !(worker[w].jobs & BIT(j)) || \
            !job[j].recorded[message[AT(w)].stage]; \
        assert(outputs_are_the_recorders) \
    }
#else
#define KEEP_OUTPUTS_ALL_THE_SAME(w) skip
#endif

/* One in doubt renews before it goes on to another message. */
#define DELIVER(x) :: d_step { RUNS(w) && worker[w].step == IDLE && !worker[w].doubt && !ended[w] && ready[x] -> \
    take(x); AT(w) = x; worker[w].holds = true; ACKNOWLEDGED_ON_DELIVERY(w); worker[w].step = DELIVERED }

inline claim(w) {
    if
    :: MAY_CLAIM(w) ->
        message[AT(w)].state = CLAIMED; message[AT(w)].token = w; message[AT(w)].lease = w;
        message[AT(w)].published = false;   /* nobody asks any more */
        worker[w].sure = !worker[w].doubt
    :: else
    fi
}

inline read_jobs(w) {
    for (j : 0 .. JOBS - 1) {
        worker[w].jobs = (job[j].message == AT(w) -> worker[w].jobs | BIT(j) : worker[w].jobs)
    }
    skip
}

inline start_handlers(w) {
    for (i : 0 .. WORKERS - 1) {
        one_at_a_time = i == w || !worker[w].sure || !RUNS_ALONE(i, worker[w].jobs, message[AT(w)].stage);
        assert(one_at_a_time)
    }
    for (j : 0 .. JOBS - 1) {
        finished_stage_not_run_again = !worker[w].sure || !(worker[w].jobs & BIT(j)) ||
            !job[j].recorded[message[AT(w)].stage];
        assert(finished_stage_not_run_again)
    }
    skip
}

/* One transaction: the message closed, its jobs moved, their outputs kept, the next message made. */
inline record(w, failed) {
    carried = 0;
    if
    :: MAY_RECORD(w) ->
        message[AT(w)].state = CLOSED;
        message[AT(w)].lease = NONE;
        for (j : 0 .. JOBS - 1) {
            if
            :: (worker[w].jobs & BIT(j)) && NAMED(w, j) -> record_job(w, j, failed)
            :: else
            fi
        }
        if
        :: carried -> make_next(w)
        :: else
        fi
    :: else                                 /* refused; or recorded before, and only the answer was lost */
        KEEP_OUTPUTS_ALL_THE_SAME(w)
    fi
}

inline record_job(w, x, failed) {
    cancelled_for_good = job[x].state != CANCELLED;
    assert(cancelled_for_good);
    if
    :: (failed) & BIT(x) -> job[x].state = RETRY_WAITING; job[x].message = NONE
    :: else ->
        recorded_once = !job[x].recorded[message[AT(w)].stage];
        assert(recorded_once);
        job[x].recorded[message[AT(w)].stage] = true;
        if
        :: IS_LAST(w) -> job[x].state = TERMINAL; job[x].message = NONE
        :: else -> carried = carried | BIT(x)
        fi
    fi
}

#ifdef FORWARD_FIRST
/* Its name was chosen, and published, before. */
inline make_next(w) { fresh = worker[w].next; fill(carried); message[fresh].published = true }
#else
inline make_next(w) { enqueue(carried, message[AT(w)].stage + 1); worker[w].next = fresh }
#endif

#ifdef FORWARD_FIRST
#define HAS_RUN(w) (worker[w].step == IN_DOUBT || worker[w].step == HANDLING && (worker[w].next != NONE || IS_LAST(w)))
#else
#define HAS_RUN(w) (worker[w].step == IN_DOUBT || worker[w].step == HANDLING)
#endif

/* What it asked about is settled, or not its affair any more. */
inline drop(w) { acknowledge(w); rest(w) }

/* A refused record makes no messages: there is nothing to forward. */
inline check_refused(w) {
    if
    :: !RECORDED_BY(w) -> drop(w)
    :: else
    fi
}

proctype Worker(byte w) {
    do
    EACH_MESSAGE(DELIVER)

    :: d_step { RUNS(w) && worker[w].step == DELIVERED ->
        claim(w);
        if
        :: MINE(w) -> worker[w].step = ASKED
        :: else -> drop(w)
        fi }
    :: d_step { RUNS(w) && worker[w].step == ASKED ->
        if
        :: MINE(w) -> read_jobs(w); start_handlers(w); worker[w].step = HANDLING
        :: else -> drop(w)
        fi }
#ifdef EARLY_ACK
    /* Handlers that take long: acknowledged, since the store shows the claim. */
    :: d_step { RUNS(w) && worker[w].step == HANDLING && worker[w].holds -> acknowledge(w) }
#endif

    :: d_step { RUNS(w) && HAS_RUN(w) -> record(w, 0); worker[w].step = RECORDED; check_refused(w) }
    /* The first job's handler fails; the answer is lost, and the record is asked for again. */
    :: d_step { RUNS(w) && HAS_RUN(w) && FAULT && (worker[w].jobs & 1) ->
        faults++; record(w, 1); worker[w].step = RECORDED; check_refused(w) }
    :: d_step { RUNS(w) && HAS_RUN(w) && FAULT && MINE(w) -> faults++; record(w, 0); worker[w].step = IN_DOUBT }
#ifdef FORWARD_FIRST
    :: d_step { RUNS(w) && worker[w].step == HANDLING && worker[w].next == NONE && !IS_LAST(w) ->
        choose_name(); worker[w].next = fresh; message[fresh].stage = message[AT(w)].stage + 1; put(fresh) }
#endif

    :: d_step { RUNS(w) && worker[w].step == RECORDED && worker[w].next != NONE ->
        put(worker[w].next); worker[w].step = SENT }
    /* The broker takes nothing now: left to the sweep. */
    :: d_step { RUNS(w) && worker[w].step == RECORDED && worker[w].next != NONE && FAULT -> faults++; drop(w) }
    :: d_step { RUNS(w) && worker[w].step == RECORDED && worker[w].next == NONE -> drop(w) }
    :: d_step { RUNS(w) && worker[w].step == SENT -> note(worker[w].next); drop(w) }

    /* Its lifeline, after it was stopped: is the lease still there? */
    :: d_step { RUNS(w) && worker[w].doubt && !ended[w] -> worker[w].doubt = false }
    :: d_step { RUNS(w) && ended[w] -> new_incarnation(w) }

    /* No heartbeat: the broker gives up the connection. */
    :: d_step { worker[w].for_ever && worker[w].holds -> let_go(w) }
    od
}

/* ---- A leader of the sweep: control/duties/sweep.py. Each duty looks, and then makes a guarded transition ---- */

#define END_LEASE(w) :: d_step { !ended[w] && LAPSED(w) -> COUNT_WITHOUT_RENEWAL; ended[w] = true }
#define LOOK(x) :: d_step { leader[me].plan == NONE && message[x].state == CLAIMED && !COVERED(x) -> \
    leader[me].plan = x }
#define UNPUBLISHED(x) :: d_step { leader[me].sent == NONE && message[x].state == OPEN && !message[x].published -> \
    put(x); leader[me].sent = x }
#define FORGOTTEN(x) :: d_step { leader[me].sent == NONE && message[x].state == OPEN && message[x].published && \
    !in_queue[message[x].stage] -> put(x); leader[me].sent = x }
#define DUE(x) :: d_step { job[x].state == RETRY_WAITING -> enqueue(BIT(x), job[x].stage) }

#ifdef NO_RENEWAL
#define COUNT_WITHOUT_RENEWAL faults++
#else
#define COUNT_WITHOUT_RENEWAL skip
#endif

proctype Sweep(byte me) {
    do
    EACH_WORKER(END_LEASE)
#ifndef NO_GIVE_BACK
    EACH_MESSAGE(LOOK)
#endif
    :: d_step { leader[me].plan != NONE -> give_back(leader[me].plan); leader[me].plan = NONE; tidy() }
#ifndef NO_UNPUBLISHED
    EACH_MESSAGE(UNPUBLISHED)
#endif
#ifndef NO_FORGOTTEN
    EACH_MESSAGE(FORGOTTEN)
#endif
    :: d_step { leader[me].sent != NONE -> note(leader[me].sent); leader[me].sent = NONE; tidy() }
    EACH_JOB(DUE)
    /* It dies, and another leads. */
    :: d_step { FAULT && leader[me].sent != NONE -> faults++; leader[me].plan = NONE; leader[me].sent = NONE; tidy() }
    od
}

/* ---- What goes wrong ---- */

#define HAS_WORK(w) (worker[w].step == DELIVERED || worker[w].step == ASKED || worker[w].step == HANDLING || \
    worker[w].step == IN_DOUBT)

#define KILL(w) :: d_step { FAULT && worker[w].step != IDLE && !worker[w].for_ever -> \
    faults++; let_go(w); new_incarnation(w); new_process(w) }
/* Told to stop at once, or its child died: the main process says goodbye for what runs. */
#define LEAVE(w) :: d_step { FAULT && RUNS(w) && worker[w].step == HANDLING && MINE(w) -> \
    faults++; give_back(AT(w)); let_go(w); new_process(w) }
/* A process that does nothing for a while needs no word here: any may. What a stop does is that its lease may run out. */
#define STOP(w) :: d_step { FAULT && !worker[w].doubt && HAS_WORK(w) -> \
    faults++; worker[w].doubt = true; worker[w].sure = false }
#define STOP_FOR_EVER(w) :: d_step { FAULT && RUNS(w) && worker[w].step != IDLE && OTHERS_GO_ON -> \
    faults++; worker[w].for_ever = true; worker[w].doubt = true; worker[w].sure = false }
#define CUT(w) :: d_step { FAULT && RUNS(w) && worker[w].holds -> faults++; let_go(w) }
#define LOSE(x) :: d_step { FAULT && ready[x] && message[x].state == OPEN -> faults++; take(x) }
/* What was published comes once more, whatever became of it meanwhile. */
#define DOUBLE(x) :: d_step { FAULT && !ready[x] && (message[x].state == CLAIMED || message[x].state == CLOSED) -> \
    faults++; add(x) }
#define CANCEL(x) :: d_step { FAULT && (job[x].state == PENDING || job[x].state == RETRY_WAITING) -> \
    faults++; job[x].state = CANCELLED; job[x].message = NONE }

proctype Trouble() {
    do
    EACH_WORKER(KILL)
    EACH_WORKER(LEAVE)
    EACH_WORKER(STOP)
    EACH_WORKER(STOP_FOR_EVER)
    EACH_WORKER(CUT)
#ifndef RELIABLE
    EACH_MESSAGE(LOSE)
    EACH_MESSAGE(DOUBLE)
#endif
    EACH_JOB(CANCEL)
    od
}

/* When nothing can happen any more. */
proctype Judge() {
    timeout ->
    d_step {
        for (j : 0 .. JOBS - 1) {
            nothing_lost = job[j].state == TERMINAL || job[j].state == CANCELLED;
            assert(nothing_lost)
        }
        for (j : 0 .. MESSAGES - 1) {
            nothing_left_behind = message[j].state == MISSING || message[j].state == CLOSED;
            assert(nothing_left_behind)
        }
        skip
    }
}

init {
    d_step {
        i = 0;
        do
        :: i < JOBS -> enqueue(((BIT(CHUNK) - 1) << i), 0); i = i + CHUNK
        :: else -> break
        od
        skip
    }
    atomic {
        for (i : 0 .. WORKERS - 1) { run Worker(i) }
        for (i : 0 .. LEADERS - 1) { run Sweep(i) }
        run Trouble();
        run Judge()
    }
}
