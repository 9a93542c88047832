// The k best of n scores, exactly, ties to the lowest position, for one head after another.
//
// Scores go to one of two score memories (UltraRAM, W to a word) while a histogram of their high bits is built. Once a
// head is complete it is searched, while the next head's scores fill the other memory:
//   WALK1   from the highest bin down: the bin in which the k-th best lies, and how many of it are wanted
//   REFINE  one scan: a histogram of the low bits of that bin's scores
//   WALK2   the same in there: the exact k-th best score, and how many ties with it are wanted
//   EMIT    one scan: positions above that score, and the first ties, in ascending order
// The area does not depend on k. With `all` every score is emitted. Scores are kept as unsigned keys (sign flipped).
module cec_topk #(
    parameter SW = 22,
    parameter TPB = 1,
    parameter NMAX = 131072,
    parameter W = 6,
    parameter NB = 18
) (
    input  wire              clk,
    input  wire              rst,
    input  wire [NB-1:0]     n,          // tokens of every head, stable during a run
    input  wire [NB-1:0]     k,          // at most n
    input  wire              all,        // emit every score
    input  wire              empty,      // nothing to score: answer `heads` times with nothing
    input  wire              start,      // of a run
    input  wire [15:0]       heads,
    output reg               running,
    // scores of a head
    output wire              room,       // a score memory is free for the next head
    input  wire              claim,      // it is taken
    input  wire              s_valid,
    input  wire [TPB*SW-1:0] s_scores,
    // the answer
    output reg               e_valid,
    input  wire              e_ready,
    output reg  [NB-1:0]     e_position,
    output reg  [SW-1:0]     e_score,    // signed
    output wire [SW-1:0]     threshold,  // the k-th best score, signed
    output wire              finish,     // all of this head's answer was given ...
    input  wire              finished    // ... and written
);
    localparam DEPTH = (NMAX + W - 1) / W;
    localparam AB = $clog2(DEPTH + 1);
    localparam HB = 11;                  // bits of the first histogram: 2,048 bins
    localparam LB = SW - HB;             // and of the second
    localparam STEPS = W / TPB;

    localparam CLEAR = 0, IDLE = 1, WALK1 = 2, REFINE = 3, WALK2 = 4, EMIT = 5, FINISH = 6;
    reg [2:0] state /*verilator public_flat_rd*/;
    reg fill, look;                      // which memory is filled, and which searched
    reg [1:0] claimed, full;
    reg [AB-1:0] words [0:1];
    reg [W-1:0] lanes [0:1];             // valid scores of the last word
    reg [15:0] left;                     // heads to be answered

    // ---- scores in: W to a word; a head's last word is padded
    reg [W*SW-1:0] word;
    reg [W-1:0] valids;
    reg [3:0] steps;
    reg [NB-1:0] missing;                // scores still to come
    reg [AB-1:0] at;
    reg write, done;
    wire pad = (missing == 0) && (steps != 0);
    wire [TPB*SW-1:0] keys;
    wire [TPB-1:0] real_score;
    genvar b, t, w;
    generate
        for (t = 0; t < TPB; t = t + 1) begin : in
            assign keys[t*SW +: SW] = {~s_scores[t*SW + SW - 1], s_scores[t*SW +: SW-1]};
            assign real_score[t] = s_valid && missing > t;
        end
    endgenerate
    wire shift = s_valid | pad;
    wire last_step = steps == STEPS - 1;
    wire [W+TPB-1:0] longer_valids = {real_score, valids};
    wire [W*SW+TPB*SW-1:0] longer_word = {keys, word};
    always @(posedge clk) begin
        write <= shift & last_step;
        done <= 0;
        if (shift) begin
            word <= longer_word[TPB*SW +: W*SW];
            valids <= longer_valids[TPB +: W];
            steps <= last_step ? 0 : steps + 1'b1;
            if (last_step && missing <= TPB) done <= 1;
        end
        if (s_valid) missing <= missing > TPB ? missing - TPB : 0;
        if (write) at <= at + 1'b1;
        if (done) begin
            words[fill] <= at + 1'b1;
            lanes[fill] <= valids;
            at <= 0;
            fill <= ~fill;
        end
        if (claim) missing <= n;
        if (rst | start) begin
            fill <= 0;
            at <= 0;
            steps <= 0;
            write <= 0;
            done <= 0;
        end
        if (rst) missing <= 0;
    end
    assign room = state != CLEAR && !claimed[fill];

    // ---- score memories and histograms
    wire step;                           // the scan moves on
    reg [AB-1:0] scan;
    reg walk;
    reg [HB-1:0] walk_bin;
    wire [W*SW-1:0] read [0:1];
    wire [17:0] high_count [0:2*TPB-1];
    wire [17:0] low_count;
    wire refine_hit;
    wire [SW-1:0] hit_key;
    generate
        for (b = 0; b < 2; b = b + 1) begin : buffer
            cec_ram #(.WIDTH(W*SW), .DEPTH(DEPTH), .AB(AB)) scores (
                .clk(clk), .we(write && fill == b), .waddr(at), .din(word),
                .re(step), .raddr(scan), .dout(read[b]));
            for (t = 0; t < TPB; t = t + 1) begin : bank
                cec_hist #(.LOG2(HB)) high (
                    .clk(clk), .inc(real_score[t] && fill == b), .bin(keys[t*SW + LB +: HB]),
                    .walk(walk && (state == CLEAR || (state == WALK1 && look == b))), .walk_bin(walk_bin),
                    .count(high_count[b*TPB + t]));
            end
        end
    endgenerate
    cec_hist #(.LOG2(LB)) low (
        .clk(clk), .inc(refine_hit), .bin(hit_key[LB-1:0]),
        .walk(walk && (state == CLEAR || state == WALK2)), .walk_bin(walk_bin[LB-1:0]), .count(low_count));

    // ---- the walk: counts arrive two cycles after their bin
    reg [17:0] count;
    reg [HB-1:0] bin1, bin2;
    reg walk1, walk2, found;
    reg [NB:0] above;                    // scores in higher bins
    reg [NB-1:0] want;                   // of the bin that is searched
    reg [SW-1:0] limit;                  // key of the k-th best
    wire [NB:0] upto = above + count;
    wire [17:0] both = TPB == 1 ? high_count[look*TPB] : high_count[look*TPB] + high_count[look*TPB + TPB - 1];

    // ---- the scan: addresses, memory, its output register, then the words' candidates one by one
    wire refine = state == REFINE;
    reg v1, v2, v3, l1, l2;              // valid, and the last word
    reg more;                            // addresses to come
    reg [W*SW-1:0] word2, word3;
    reg [W-1:0] above3, equal3;
    reg [NB-1:0] base3, base_next;
    wire [W-1:0] is_above, is_equal;
    wire [W-1:0] valid2 = l2 ? lanes[look] : {W{1'b1}};
    generate
        for (w = 0; w < W; w = w + 1) begin : compare
            wire [SW-1:0] key = word2[w*SW +: SW];
            assign is_above[w] = valid2[w] && !refine && key > limit;
            assign is_equal[w] = valid2[w] && key[SW-1:LB] == limit[SW-1:LB] && (refine || key[LB-1:0] == limit[LB-1:0]);
        end
    endgenerate
    reg ties;                            // wanted still
    wire [W-1:0] candidates = v3 ? above3 | (equal3 & {W{ties}}) : {W{1'b0}};
    wire [W-1:0] lowest = candidates & (~candidates + 1'b1);
    reg [SW-1:0] lowest_key;
    reg [3:0] lowest_lane;
    integer j;
    always @* begin
        lowest_key = 0;
        lowest_lane = 0;
        for (j = 0; j < W; j = j + 1) begin
            lowest_key = lowest_key | (word3[j*SW +: SW] & {SW{lowest[j]}});
            lowest_lane = lowest_lane | (lowest[j] ? j[3:0] : 4'd0);
        end
    end
    wire take = refine || !e_valid || e_ready;
    wire fire = (candidates != 0) && take;
    assign step = (candidates == 0) || (take && candidates == lowest);
    assign refine_hit = fire && refine;
    assign hit_key = lowest_key;
    reg [NB-1:0] to_emit;
    wire scanned = !more && !v1 && !v2 && !v3;
    wire enough = to_emit == 0;

    assign threshold = {~limit[SW-1], limit[SW-2:0]};
    assign finish = state == FINISH;

    always @(posedge clk) begin
        bin1 <= walk_bin;
        bin2 <= bin1;
        walk1 <= walk;
        walk2 <= walk1;
        count <= state == WALK2 ? low_count : both;
        if (walk) begin
            walk_bin <= walk_bin - 1'b1;
            if (walk_bin == 0) walk <= 0;
        end
        if (walk2 && !found) begin
            above <= upto;
            if (upto >= want) begin
                found <= 1;
                want <= want - above[NB-1:0];
                if (state == WALK1) limit <= {bin2, {LB{1'b0}}};
                else limit[LB-1:0] <= bin2[LB-1:0];
            end
        end

        if (step) begin
            v1 <= more;
            l1 <= scan + 1'b1 == words[look];
            if (more) begin
                scan <= scan + 1'b1;
                if (scan + 1'b1 == words[look]) more <= 0;
            end
            v2 <= v1;
            l2 <= l1;
            v3 <= v2;
            word3 <= word2;
            above3 <= is_above;
            equal3 <= is_equal;
            if (v2) begin
                base3 <= base_next;
                base_next <= base_next + W;
            end
        end else if (fire) begin
            above3 <= above3 & ~lowest;
            equal3 <= equal3 & ~lowest;
        end
        if (e_ready) e_valid <= 0;
        if (fire && !refine) begin
            e_valid <= 1;
            e_position <= base3 + lowest_lane;
            e_score <= {~lowest_key[SW-1], lowest_key[SW-2:0]};
            to_emit <= to_emit - 1'b1;
            if ((lowest & above3) == 0) begin
                want <= want - 1'b1;
                ties <= want != 1;
            end
        end

        case (state)
            CLEAR: if (!walk && !walk1) state <= IDLE;
            IDLE: begin
                above <= 0;
                found <= 0;
                want <= all ? n : k;
                to_emit <= all ? n : k;
                if (left == 0) running <= 0;
                else if (empty) begin
                    limit <= {1'b1, {(SW-1){1'b0}}};
                    state <= FINISH;
                end else if (full[look]) begin
                    walk <= 1;
                    walk_bin <= {HB{1'b1}};
                    state <= WALK1;
                end
            end
            WALK1: if (!walk && !walk1 && !walk2) begin
                state <= all ? EMIT : REFINE;
                if (all) limit <= 0;
                scan <= 0;
                more <= 1;
                ties <= 1;
                base_next <= 0;
            end
            REFINE: if (scanned) begin
                above <= 0;
                found <= 0;
                walk <= 1;
                walk_bin <= {{(HB-LB){1'b0}}, {LB{1'b1}}};
                state <= WALK2;
            end
            WALK2: if (!walk && !walk1 && !walk2) begin
                state <= EMIT;
                scan <= 0;
                more <= 1;
                ties <= 1;
                base_next <= 0;
            end
            EMIT: if (enough || scanned) begin
                more <= 0;
                v1 <= 0;
                v2 <= 0;
                v3 <= 0;
                if (!e_valid) state <= FINISH;
            end
            FINISH: if (finished) begin
                left <= left - 1'b1;
                state <= IDLE;
            end
            default: state <= CLEAR;
        endcase

        if (claim) claimed[fill] <= 1;
        if (done) full[fill] <= 1;
        if (state == FINISH && finished && !empty) begin
            claimed[look] <= 0;
            full[look] <= 0;
            look <= ~look;
        end
        if (start) begin
            running <= 1;
            left <= heads;
            look <= 0;
        end
        if (rst) begin
            state <= CLEAR;
            walk <= 1;
            walk_bin <= {HB{1'b1}};
            walk1 <= 1;
            claimed <= 0;
            full <= 0;
            running <= 0;
            left <= 0;
            e_valid <= 0;
            more <= 0;
            v1 <= 0;
            v2 <= 0;
            v3 <= 0;
        end
    end

    always @(posedge clk) if (step) word2 <= look ? read[1] : read[0];
endmodule

// One write and one read port; the read has one cycle of latency and an enable.
module cec_ram #(
    parameter WIDTH = 132,
    parameter DEPTH = 21846,
    parameter AB = 15
) (
    input  wire             clk,
    input  wire             we,
    input  wire [AB-1:0]    waddr,
    input  wire [WIDTH-1:0] din,
    input  wire             re,
    input  wire [AB-1:0]    raddr,
    output reg  [WIDTH-1:0] dout
);
    (* ram_style = "ultra" *) reg [WIDTH-1:0] mem [0:DEPTH-1];
    always @(posedge clk) begin
        if (we) mem[waddr] <= din;
        if (re) dout <= mem[raddr];
    end
endmodule
